"""`kv_cache_scales`: static scales of a quantized key-value cache, and the files that serving engines read them from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from fxcompress.capture import capture
from fxcompress.checkpoints.folder import add_tensors
from fxcompress.data import CalibrationData, example_from
from fxcompress.errors import CalibrationError, UsageError
from fxcompress.ir import Program, evaluating
from fxcompress.kv_cache.find import Attention, find_attention
from fxcompress.kv_cache.observe import CacheFormat, CacheTally, cache_format
from fxcompress.progress import progress_bar
from fxcompress.prune.sensitivity_report import write
from fxcompress.vocabulary import tokens_checked

__all__ = ["KVCacheScales", "LayerScales", "kv_cache_scales"]

_STRATEGIES: Final = {"tensor": "tensor", "head": "attn_head"}


@dataclass(frozen=True)
class LayerScales:
    """One attention layer.

    Attributes:
        name: Path of the attention module.
        key: Largest key that is stored without clipping: float32 [1, 1], [heads, 1] or [heads, features].
        value: The same of the values.
        heads: Heads of the cache.
        features: Features of a head.
        key_sqnr_db: Signal to rounding noise of the keys, decibels, on a sample of at most 1,024 tokens.
        value_sqnr_db: The same of the values.
    """

    name: str
    key: Tensor
    value: Tensor
    heads: int
    features: int
    key_sqnr_db: float
    value_sqnr_db: float


@dataclass(frozen=True)
class KVCacheScales:
    """Ranges of the keys and values of every layer, in execution order.

    Engines divide the range by numbers of their own (`save_genai`, `save_compressed_tensors`), so what is kept here are
    the ranges.

    Attributes:
        bits: 8, 4 or ``"fp8"``.
        granularity: ``tensor``, ``head`` or ``channel``.
        layers: One per attention layer.
        tokens: Tokens observed.
        notes: What else to know.
    """

    bits: int | str
    granularity: str
    layers: tuple[LayerScales, ...]
    tokens: int
    notes: tuple[str, ...] = ()

    @property
    def format(self) -> CacheFormat:
        """How numbers are stored."""
        found = cache_format(self.bits)
        assert found is not None
        return found

    @property
    def genai_type(self) -> str:
        """``kv_cache_quant_type`` of ONNX Runtime GenAI's model builder, e.g. ``int8_per_channel``."""
        return f"{self.format.name}_per_{self.granularity}"

    def scales(self, divisor: float | None = None) -> list[tuple[Tensor, Tensor]]:
        """Scales of keys and values of every layer: range over ``divisor`` (default: ONNX Runtime's)."""
        by = self.format.largest if divisor is None else divisor
        return [(layer.key / by, layer.value / by) for layer in self.layers]

    def table(self) -> str:
        """One line per layer."""
        width = max([len("layer"), *(len(x.name) for x in self.layers)])
        lines = [
            f"{self.genai_type} cache, {len(self.layers)} layers, {self.tokens} tokens",
            f"{'layer':{width}}  {'max |K|':>9}{'K dB':>7}{'max |V|':>10}{'V dB':>7}",
        ]
        for x in self.layers:
            lines.append(
                f"{x.name:{width}}  {float(x.key.max()):>9.3g}{x.key_sqnr_db:>7.1f}{float(x.value.max()):>10.3g}"
                f"{x.value_sqnr_db:>7.1f}"
            )
        return "\n".join([*lines, *self.notes])

    __str__ = table

    def save_genai(self, path: str | Path) -> Path:
        """Write the file for ``kv_cache_scale_file`` of ONNX Runtime GenAI's model builder (with `genai_type`).

        One scale per layer, or ``heads * features`` of them with the heads one after the other.

        Raises:
            UsageError: the granularity is ``head``, which the builder does not have.
            ArtifactError: the file cannot be written.
        """
        if self.granularity == "head":
            raise self._cannot("ONNX Runtime GenAI", "tensor or channel")
        flat = [[t.flatten().tolist() for t in pair] for pair in self.scales()]
        if self.granularity == "tensor":
            flat = [[values[0] for values in pair] for pair in flat]
        content = {
            "scales": {"k_scales": [k for k, _ in flat], "v_scales": [v for _, v in flat]},
            "layer_ids": [_layer_id(x.name, i) for i, x in enumerate(self.layers)],
            "qmax": self.format.largest,
        }
        return write(Path(path), json.dumps(content, indent=1, allow_nan=False))

    def save_compressed_tensors(self, folder: str | Path, *, prefix: str = "") -> Path:
        """Add ``<attention>.k_scale`` and ``.v_scale`` and the ``kv_cache_scheme`` to a checkpoint.

        Args:
            folder: With ``model.safetensors`` and ``config.json``, as `save_compressed_tensors` or transformers write
                them. vLLM runs 8-bit floats per tensor or per head.
            prefix: What stands in front of every name in the program and not in the checkpoint, e.g. ``"model."``.

        Returns:
            The folder.

        Raises:
            UsageError: the granularity is ``channel``, which the format does not have.
            ArtifactError: the checkpoint cannot be read or written, or has no such attention layer.
        """
        if self.granularity == "channel":
            raise self._cannot("compressed-tensors", "tensor or head")
        tensors = {}
        for layer, pair in zip(self.layers, self.scales(self.format.middle), strict=True):
            for letter, scale in zip("kv", pair, strict=True):
                name = f"{layer.name.removeprefix(prefix)}.{letter}_scale"
                tensors[name] = scale.reshape(1 if self.granularity == "tensor" else (-1, 1, 1)).contiguous()
        scheme = {
            "num_bits": self.format.bits,
            "type": "float" if self.format.name == "fp8" else "int",
            "strategy": _STRATEGIES[self.granularity],
            "symmetric": True,
            "dynamic": False,
        }
        add_tensors(Path(folder), tensors, {"kv_cache_scheme": scheme})
        return Path(folder)

    def _cannot(self, holder: str, known: str) -> UsageError:
        what = f"{holder} has no scales per {self.granularity} of the key-value cache"
        return UsageError(570, what, fix=f"observe again with granularity {known}")


def kv_cache_scales(
    program: Program | nn.Module,
    data: Iterable[Any],
    *,
    bits: int | str = 8,
    granularity: str = "tensor",
    method: str = "minmax",
    samples: int = 128,
    rotary: bool | None = None,
    progress: bool = False,
) -> KVCacheScales:
    """Observe the keys and values of every attention layer, as a cache would store them.

    Memory: one run of the program, and 1,024 tokens of keys and values per layer.

    Args:
        program: A captured decoder, or the model itself (captured with the first batch as the example).
        data: Batches as for calibration, without padding: padded tokens would count as tokens.
        bits: 8, 4 or ``"fp8"`` (E4M3).
        granularity: One scale per ``tensor``, per ``head`` or per ``channel`` (feature of a head), for keys and values.
        method: ``minmax``: nothing is clipped; ``mse``: the range with the least squared error.
        samples: Sequences to run at most (whole batches).
        rotary: Take ranges of keys that hold at every position, for models that rotate keys by halves. Default: found
            in the graph.
        progress: Show a progress bar on stderr.

    Raises:
        UsageError: an option is not known, or the program has no attention that keeps [batch, heads, tokens, features].
        CalibrationError: as from calibration; or keys or values are NaN or infinity.
    """
    form = _checked_options(bits, granularity, method, samples)
    source = data if isinstance(data, CalibrationData) else CalibrationData(data)
    if not isinstance(program, Program):
        program = capture(program, *example_from(source, program))
    layers = find_attention(program)
    if not layers:
        why = "no attention whose keys and values are [batch, heads, tokens, features]"
        raise UsageError(572, "the program keeps no keys and values", why=why, fix="capture a decoder of transformers")
    tallies = [
        (
            CacheTally(f"keys of {x.name}", x.rotary if rotary is None else rotary),
            CacheTally(f"values of {x.name}", False),
        )
        for x in layers
    ]
    _observe(program, layers, tallies, source, samples, progress)
    found = [_scales(x, *pair, granularity, method == "mse", form) for x, pair in zip(layers, tallies, strict=True)]
    return KVCacheScales(bits, granularity, tuple(found), tallies[0][0].tokens, tuple(source.notes(samples)))


def _checked_options(bits: int | str, granularity: str, method: str, samples: int) -> CacheFormat:
    form = cache_format(bits)
    if (
        form is None
        or granularity not in ("tensor", "head", "channel")
        or method not in ("minmax", "mse")
        or samples < 1
    ):
        what = f"bits={bits!r}, granularity={granularity!r}, method={method!r}, samples={samples}: not known"
        fix = "bits: 8, 4 or 'fp8'; granularity: tensor, head or channel; method: minmax or mse; samples: 1 or more"
        raise UsageError(571, what, fix=fix)
    return form


def _scales(
    layer: Attention, keys: CacheTally, values: CacheTally, granularity: str, clip: bool, form: CacheFormat
) -> LayerScales:
    assert keys.peaks is not None
    key, value = (t.thresholds(granularity, clip, form) for t in (keys, values))
    heads, features = keys.peaks.shape
    return LayerScales(layer.name, key, value, heads, features, keys.sqnr_db(key, form), values.sqnr_db(value, form))


class _Watcher(Interpreter):
    """Runs a program and shows some of its values."""

    def __init__(self, program: Program, watched: dict[Node, list[CacheTally]]) -> None:
        super().__init__(program.gm)
        self.extra_traceback = False  # an error of a model names its line already
        self.watched = watched

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        for tally in self.watched.get(n, ()):
            tally.add(result)
        return result


def _observe(
    program: Program,
    layers: list[Attention],
    tallies: list[tuple[CacheTally, CacheTally]],
    data: CalibrationData,
    samples: int,
    progress: bool,
) -> None:
    watched: dict[Node, list[CacheTally]] = {}
    for layer, (keys, values) in zip(layers, tallies, strict=True):
        watched.setdefault(layer.key, []).append(keys)
        watched.setdefault(layer.value, []).append(values)
    header = f"key-value cache: {len(layers)} layers, at most {samples} sequences"
    with torch.no_grad(), evaluating(program.gm), progress_bar("observed", samples, progress, header) as advance:
        before = 0
        for number, call in enumerate(data.calls(program, samples)):
            try:
                with tokens_checked(program, number):
                    _Watcher(program, watched).run(*program.signature.flatten(*call), enable_io_processing=False)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                why = f"{type(error).__name__}: {error}"
                raise CalibrationError(312, f"the decoder fails on batch {number}", why=why) from error
            advance(data.seen - before)
            before = data.seen


def _layer_id(name: str, position: int) -> int:
    """The number in ``model.layers.7.self_attn``; the position where there is none."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[-1]) if numbers else position
