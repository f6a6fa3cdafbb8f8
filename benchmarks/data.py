"""The data the benchmarks measure on: an ImageNet sample and the STS-B development set.

The folder is ``$FXC_DATA``, or ``data`` in the checkout. It holds ``imagenet_sample_dev.npz`` (334 JPEG
images of 256 x 256 pixels, every third ImageNet class: ``data`` is the bytes of all files, ``offsets`` their borders,
``labels`` the class indices) and ``stsb_en_dev.csv`` (sentence, sentence, score 0 to 5).
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

CALIBRATION_IMAGES: Final = 128
"""Calibration images are taken from the first 128 of the sample; the other 206 are held out."""

_MEANS: Final = {"lite": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))}
_MEANS["imagenet"] = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def folder() -> Path:
    """The data folder: ``$FXC_DATA``, or ``data`` in the checkout.

    Raises:
        FileNotFoundError: The folder is not there.
    """
    default = Path(__file__).resolve().parents[1] / "data"
    path = Path(os.environ.get("FXC_DATA", default))
    if not path.is_dir():
        raise FileNotFoundError(f"no data folder at {path}: set FXC_DATA to the folder with imagenet_sample_dev.npz")
    return path


class Images:
    """The ImageNet sample, decoded when asked for.

    Args:
        preprocessing: ``"lite"``: (RGB - 127) / 128, EfficientNet-Lite's; ``"imagenet"``: torchvision's mean and
        deviation. size: Side of the centre crop in pixels.
    """

    def __init__(self, preprocessing: str = "imagenet", size: int = 224) -> None:
        pack = np.load(folder() / "imagenet_sample_dev.npz")
        self._bytes, self._offsets = pack["data"].tobytes(), [int(i) for i in pack["offsets"]]
        self.labels: IntArray = pack["labels"].astype(np.int64)
        self._mean, self._deviation = (np.array(v, dtype=np.float32) for v in _MEANS[preprocessing])
        self._size = size

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Array:
        """Image ``index`` as float32 ``[3, size, size]``."""
        from PIL import Image

        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, end = self._offsets[index : index + 2]
        image = Image.open(io.BytesIO(self._bytes[begin:end])).convert("RGB")
        left, top = (image.width - self._size) // 2, (image.height - self._size) // 2
        pixels = np.asarray(image.crop((left, top, left + self._size, top + self._size)), dtype=np.float32)
        return np.ascontiguousarray(((pixels - self._mean) / self._deviation).transpose(2, 0, 1))

    def stack(self, count: int | None = None) -> Array:
        """The first ``count`` images (all by default) as float32 ``[count, 3, size, size]``."""
        return np.stack([self[i] for i in range(len(self) if count is None else min(count, len(self)))])


class Batches:
    """A re-iterable of batches of one image tensor ``[batch, 3, 224, 224]``: what ``calibration=`` takes.

    Args:
        images: Where the images come from; decoded on the way, so that memory does not grow with ``count``.
        count: How many images; beyond the end of the sample it starts again at the first.
        batch: Images per batch.
    """

    def __init__(self, images: Images, count: int, batch: int = 1) -> None:
        self.images, self.count, self.batch = images, count, batch

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for begin in range(0, self.count, self.batch):
            indices = range(begin, min(begin + self.batch, self.count))
            yield torch.from_numpy(np.stack([self.images[i % len(self.images)] for i in indices]))


def sts_pairs(limit: int | None = None) -> tuple[list[tuple[str, str]], Array]:
    """STS-B development pairs and their human similarity scores (0 to 5)."""
    with open(folder() / "stsb_en_dev.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if len(row) == 3][:limit]
    return [(a, b) for a, b, _ in rows], np.array([float(score) for *_, score in rows], dtype=np.float32)


def spearman(left: Array, right: Array, scores: Array) -> float:
    """Spearman rank correlation of cosine similarity of rows with ``scores``.

    Args:
        left: Embeddings ``[n, d]`` of unit length.
        right: Embeddings ``[n, d]`` of unit length.
        scores: Human scores ``[n]``.
    """
    from scipy.stats import spearmanr

    similarity = (left.astype(np.float64) * right.astype(np.float64)).sum(axis=1)
    return float(spearmanr(similarity, scores).statistic)


def top1(logits: Array, labels: IntArray) -> float:
    """Share of rows of ``logits [n, classes]`` whose largest entry is the label, 0 to 1."""
    return float((logits.argmax(axis=1) == labels).mean())
