"""``--data``: a folder of images or an .npz file as calibration batches, and as labelled samples to score with."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fxcompress.errors import CalibrationError, UsageError
from fxcompress.preprocess import Preprocessing, image_tensor

__all__ = ["LABELS", "Batches", "DataSet", "InputFacts", "open_data", "random_batches", "top1"]

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LABELS = ("labels", "y", "label", "targets")
_INPUTS = ("x", "images", "inputs", "input", "data")
#: Float types that are cast to what models take.
_CASTS = {np.dtype(np.float64): np.float32, np.dtype(np.int32): np.int64, np.dtype(np.uint32): np.int64}


@dataclass(frozen=True)
class InputFacts:
    """What is known of the model's inputs before it is captured.

    Attributes:
        names: Parameter names of forward.
        image: Channels, height and width of its image input, or None.
        classes: Size of the last dimension of its first output, or None.
        preprocessing: How images become inputs.
    """

    names: tuple[str, ...]
    image: tuple[int, int, int] | None
    classes: int | None
    preprocessing: Preprocessing


class Source(Protocol):
    """Samples by index."""

    @property
    def labels(self) -> Sequence[int] | None: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Any:
        """Inputs of these samples: a tensor, or a dict of tensors by name."""


@dataclass(frozen=True)
class Batches:
    """Chosen samples of a source in batches, again and again.

    Yields the inputs, or with ``labelled`` pairs ``(inputs, int64 [batch])``. ``whole`` drops a last batch that is
    smaller than the others.
    """

    source: Source
    indices: tuple[int, ...]
    size: int
    labelled: bool = False
    whole: bool = False

    def __len__(self) -> int:
        return len(self._starts())

    def _starts(self) -> range:
        count = len(self.indices)
        return range(0, count - count % self.size if self.whole else count, self.size)

    def __iter__(self) -> Iterator[Any]:
        for start in self._starts():
            chosen = self.indices[start : start + self.size]
            inputs = self.source.batch(chosen)
            if self.labelled and self.source.labels is not None:
                yield inputs, torch.tensor([self.source.labels[i] for i in chosen])
            else:
                yield inputs


@dataclass
class DataSet:
    """What ``--data`` gives.

    Attributes:
        calibration: Batches to calibrate with.
        scoring: Labelled batches to score with, or None.
        notes: How the data was understood.
    """

    calibration: Batches
    scoring: Batches | None
    notes: list[str] = field(default_factory=list)

    def example(self) -> Any:
        """Inputs of one sample."""
        return self.calibration.source.batch(self.calibration.indices[:1])


def open_data(path: Path, facts: InputFacts, *, samples: int, batch: int, seed: int, whole: bool = False) -> DataSet:
    """Read ``path`` as far as needed to know its samples and labels.

    Calibration takes ``samples`` of them, chosen at random (a folder is sorted by class). Scoring takes the others, or
    all of them when fewer than ``samples`` would be left.

    Args:
        path: A folder of images (sub-folders are classes) or an ``.npz`` file.
        facts: The model's inputs.
        samples: Calibration samples.
        batch: Samples per batch.
        seed: Of the choice.
        whole: Every batch has to have ``batch`` samples.

    Raises:
        UsageError: neither of the two, or arrays that do not fit the inputs.
        CalibrationError: nothing in it, or a file that cannot be read.
    """
    notes: list[str] = []
    if path.is_dir():
        source: Source = _open_folder(path, facts, notes)
    elif path.suffix == ".npz" and path.is_file():
        source = _open_arrays(path, facts, notes)
    else:
        what = f"{path} is neither a folder nor an .npz file" if path.exists() else f"there is no {path}"
        raise UsageError(52, what, fix="--data takes a folder of images or an .npz with arrays named like the inputs")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, rest = tuple(order[:samples]), tuple(order[samples:])
    notes.insert(0, f"{len(source)} samples in {path}, {len(chosen)} to calibrate with")
    scoring = None
    if source.labels is not None:
        held_out = len(rest) >= samples
        scoring = Batches(source, rest if held_out else tuple(order), batch, labelled=True, whole=whole)
        what = f"the other {len(rest)} samples" if held_out else f"all {len(order)} samples, those of calibration too"
        notes.append(f"top-1 accuracy is measured on {what}")
    return DataSet(Batches(source, chosen, batch, whole=whole), scoring, notes)


def top1(batches: Batches) -> Callable[[Callable[..., Any]], float]:
    """Scores a model or engine: the share of labelled samples whose largest output is the label."""

    def score(model: Callable[..., Any]) -> float:
        right = total = 0
        with torch.no_grad():
            for inputs, labels in batches:
                output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
                right += int((logits_of(output).argmax(-1) == labels).sum())
                total += len(labels)
        return right / max(1, total)

    return score


def logits_of(output: Any) -> Tensor:
    """The class scores in a model's output: the tensor itself, ``.logits``, or the first tensor."""
    if isinstance(output, dict):
        output = output.get("logits", next(iter(output.values()), None))
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) and output else None)
    if not isinstance(output, Tensor) or output.dim() < 1:
        raise UsageError(53, "the model's output holds no class scores", fix="leave the labels out of --data")
    return output


@dataclass(frozen=True)
class _Random:
    """Noise in the shape of an example; integers are taken from the example itself."""

    example: tuple[tuple[Any, ...], dict[str, Any]]
    count: int
    labels: Sequence[int] | None = None

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Sequence[int]) -> Any:
        generator = torch.Generator().manual_seed(indices[0] if indices else 0)

        def make(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            repeats = -(-len(indices) // value.shape[0])
            full = torch.cat([value] * repeats)[: len(indices)]
            noise = torch.randn(full.shape, generator=generator)
            return noise.to(full.dtype) if full.is_floating_point() else full

        args, kwargs = self.example
        return {k: make(v) for k, v in kwargs.items()} if kwargs else tuple(make(v) for v in args)


def random_batches(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, samples: int, batch: int, whole: bool = False
) -> DataSet:
    """Random calibration data: good for trying a model's speed, useless for its accuracy."""
    source = _Random((args, kwargs), samples)
    notes = ["random calibration data: the accuracy of the result means nothing"]
    return DataSet(Batches(source, tuple(range(samples)), batch, whole=whole), None, notes)


# ------------------------------------------------------------------------------------------------------------ images
@dataclass(frozen=True)
class _Images:
    files: Sequence[Path | np.ndarray[Any, Any]]
    labels: Sequence[int] | None
    shape: tuple[int, int, int]
    how: Preprocessing

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([image_tensor(self.files[i], self.shape, self.how) for i in indices])


def _open_folder(path: Path, facts: InputFacts, notes: list[str]) -> _Images:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES and p.is_file())
    if not files:
        raise CalibrationError(
            21, f"there is no image in {path}", fix=f"it should hold files ending in {', '.join(_IMAGES)}"
        )
    if facts.image is None:
        raise UsageError(54, "the size of the model's images is not known", fix="add --input-shape 1,3,224,224")
    classes = [p.relative_to(path).parts[0] if len(p.relative_to(path).parts) > 1 else None for p in files]
    labels = _class_labels(classes, facts.classes, notes)
    return _Images(files, labels, facts.image, facts.preprocessing)


def _class_labels(names: Sequence[str | None], classes: int | None, notes: list[str]) -> list[int] | None:
    """Class index of each file from its folder's name: the number in it, or its place among all of them."""
    folders = sorted({n for n in names if n is not None})
    if not folders or None in names:
        return None
    if all(f.isdigit() for f in folders):
        index = {f: int(f) for f in folders}
    elif len(folders) == classes:
        index = {f: i for i, f in enumerate(folders)}
    else:
        notes.append(
            f"{len(folders)} class folders, but the model has {classes or 'no'} outputs: accuracy is not measured "
            "(name the folders by class number)"
        )
        return None
    return [index[str(n)] for n in names]


# -------------------------------------------------------------------------------------------------------------- .npz
@dataclass(frozen=True)
class _Arrays:
    inputs: dict[str, np.ndarray[Any, Any]]
    labels: Sequence[int] | None
    by_name: bool

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def batch(self, indices: Sequence[int]) -> Any:
        chosen = {k: torch.from_numpy(np.ascontiguousarray(v[list(indices)])) for k, v in self.inputs.items()}
        return chosen if self.by_name else next(iter(chosen.values()))


def _open_arrays(path: Path, facts: InputFacts, notes: list[str]) -> Source:
    arrays = _read_arrays(path)
    label = next((n for n in LABELS if n in arrays and n not in facts.names), None)
    labels = None if label is None else [int(v) for v in arrays.pop(label).reshape(-1)]
    sizes = {name: len(v) if v.ndim else 0 for name, v in arrays.items()}
    if not arrays or min(sizes.values()) == 0:
        raise CalibrationError(
            22, f"{path} holds no samples", where=str(sizes), fix="every array needs samples in dimension 0"
        )
    counts = set(sizes.values()) | ({len(labels)} if labels is not None else set())
    if len(counts) > 1:
        raise CalibrationError(
            23, f"the arrays of {path} differ in length", where=str(sizes), why=f"labels: {len(labels or [])}"
        )
    by_name = set(arrays) <= set(facts.names)
    if not by_name and len(arrays) > 1:
        known = {n: v for n, v in arrays.items() if n in _INPUTS}
        if len(known) != 1:
            fix = f"name them after the inputs: {', '.join(facts.names)}"
            raise UsageError(55, f"the arrays {', '.join(arrays)} do not fit the model's inputs", fix=fix)
        notes.append(f"of the arrays {', '.join(arrays)} only {next(iter(known))} is used")
        arrays = known
    first = next(iter(arrays.values()))
    if len(arrays) == 1 and first.dtype == np.uint8 and first.ndim == 4:
        return _pixel_source(first, labels, facts, notes)
    return _Arrays({n: v.astype(_CASTS.get(v.dtype, v.dtype), copy=False) for n, v in arrays.items()}, labels, by_name)


def _read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with np.load(path, allow_pickle=False) as pack:
            return {name: pack[name] for name in pack.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CalibrationError(24, f"{path} cannot be read", why=str(error), fix="write it with numpy.savez") from error


def _pixel_source(
    pixels: np.ndarray[Any, Any], labels: Sequence[int] | None, facts: InputFacts, notes: list[str]
) -> _Images:
    """uint8 [n, height, width, channels] or [n, channels, height, width] goes the way of image files."""
    last = pixels if pixels.shape[-1] in (1, 3) else pixels.transpose(0, 2, 3, 1)
    if last.shape[-1] not in (1, 3):
        raise CalibrationError(25, f"uint8 images of shape {list(pixels.shape)} have neither 1 nor 3 channels")
    notes.append("uint8 arrays are taken as images: resized, cropped and normalized")
    shape = facts.image or (last.shape[-1], last.shape[1], last.shape[2])
    return _Images([np.ascontiguousarray(image) for image in last], labels, shape, facts.preprocessing)
