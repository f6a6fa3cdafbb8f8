"""`save_compressed_tensors`: a quantized program as a checkpoint that transformers and vLLM load."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.checkpoints.folder import CONFIG, empty_quantization, write_checkpoint
from fxcompress.checkpoints.model_names import check_names
from fxcompress.errors import ArtifactError, UsageError
from fxcompress.ir import Program
from fxcompress.kernels.imports import PackedWeight, to_compressed_tensors
from fxcompress.kernels.layouts import check_groups, pack_int4
from fxcompress.quant.fake_quantize import QUANTIZERS, DynamicFakeQuantize, FakeQuantize
from fxcompress.quant.placement import layer_kind
from fxcompress.quant_analysis.subjects import Subject, find_subjects

__all__ = ["Format", "Integers", "save_compressed_tensors", "weight_integers"]

Format = Literal["auto", "pack-quantized", "int-quantized", "naive-quantized"]
_FORMATS: Final = ("auto", "pack-quantized", "int-quantized", "naive-quantized")
_FIX: Final = "leave it out of quantization with ignore=..., or save the engine instead"


@dataclass(frozen=True)
class Integers:
    """A weight on its grid, as signed integers of 4 or 8 bits.

    Attributes:
        values: int8 [out, in].
        scale: Float [out, groups].
        zero_point: int8 [out, groups]; None: symmetric.
        bits: 4 or 8: the container; grids of 2 and 3 bits lie in 4, those of 5 to 7 in 8.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    @property
    def group_size(self) -> int | None:
        """Input features that share a scale; None: all."""
        groups = self.scale.shape[1]
        return None if groups == 1 else self.values.shape[1] // groups

    def packed(self) -> PackedWeight:
        """In the layout of the kernels."""
        half = 1 << (self.bits - 1)
        zeros = None if self.zero_point is None else (self.zero_point.to(torch.int16) + half).to(torch.uint8).T
        fields = (self.values.to(torch.int16) + half).to(torch.uint8)
        weight = self.values if self.bits == 8 else pack_int4(fields)
        features = int(self.values.shape[1])
        return PackedWeight(weight, self.scale.T.contiguous(), zeros, None, self.bits, features)


def weight_integers(weight: Tensor, quantizer: FakeQuantize) -> Integers:
    """The integers that ``quantizer`` stands for.

    Args:
        weight: Float [out, in].
        quantizer: Its frozen grid of at most 8 bits, along the rows.
    """
    spec, (rows, features) = quantizer.spec, weight.shape
    group = spec.group_size or features
    scale = quantizer.scale.detach().float().reshape(-1, features // group).expand(rows, -1)
    zero = quantizer.zero_point.detach().to(torch.int32).reshape(-1, features // group).expand(rows, -1)
    steps = torch.div(weight.detach().float().unflatten(1, (-1, group)), scale[..., None]).round_()
    values = steps.add_(zero[..., None]).clamp_(spec.qmin, spec.qmax).flatten(1)
    half = 0 if spec.signed else 1 << (spec.bits - 1)
    symmetric = spec.symmetric and bool((zero == half).all())
    return Integers(
        (values - half).to(torch.int8),
        scale.contiguous(),
        None if symmetric else (zero - half).to(torch.int8).contiguous(),
        4 if spec.bits <= 4 else 8,
    )


@dataclass(frozen=True)
class _Layer:
    """A quantized linear layer of the program."""

    name: str
    node: Node
    module: nn.Module
    weight: FakeQuantize
    data: nn.Module | None


def save_compressed_tensors(
    program: Program,
    folder: str | Path,
    *,
    config: Any = None,
    format: Format = "auto",
    prefix: str = "",
) -> Path:
    """Write ``model.safetensors`` and ``config.json`` with a ``quantization_config`` of compressed-tensors.

    Linear layers with 2- to 8-bit weights become ``pack-quantized``; with 8-bit inputs (static, per token or per block)
    ``int-quantized``. Everything else is written as the program has it, so channel scales and rotations that passes
    folded into the weights are in the checkpoint. Tied weights are written once where ``config`` ties them.

    Args:
        program: A captured model of transformers whose linear layers were quantized.
        folder: Made when missing; other files in it (tokenizer) stay.
        config: The model's own configuration: an object with ``to_dict`` (``model.config``), a mapping, or the folder or
            file it lies in. None: ``config.json`` holds the quantization only, which this package alone can read.
        format: ``auto``; or ``naive-quantized``: one int8 per weight, unpacked, for weight-only layers.
        prefix: What stands in front of every name in the program and not in the checkpoint, e.g. ``"model."`` when a
            wrapper was captured.

    Returns:
        The folder.

    Raises:
        UsageError: the tensors are not those of the model that ``config`` describes (compared where transformers is
            installed); the program is not quantized, or holds something quantized that the format has no place for: a
            convolution, a value between layers, an embedding, asymmetric 8-bit weights, groups that are no multiple of
            32.
        ArtifactError: the configuration cannot be read, or the folder not be written.
    """
    layers = _linear_layers(program)
    if format not in _FORMATS:
        raise UsageError(580, f"unknown checkpoint format {format!r}", fix=f"use one of {', '.join(_FORMATS)}")
    tensors = _float_tensors(program, {f"{layer.name}.weight" for layer in layers})
    groups: dict[str, dict[str, Any]] = {}
    for layer in layers:
        integers = _checked_integers(program, layer)
        scheme = _scheme(layer, integers, format)
        found = groups.setdefault(json.dumps(scheme, sort_keys=True), {**scheme, "targets": []})
        found["targets"].append(layer.name.removeprefix(prefix))
        tensors |= {f"{layer.name}.{n}": t for n, t in _layer_tensors(layer, integers, scheme["format"]).items()}
    whole = _config(config)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    _settle_ties(whole, own, prefix)
    whole["quantization_config"] = _quantization(program, list(groups.values()), layers, prefix)
    floats = {t.dtype for t in own.values() if t.is_floating_point() and t.dim() > 1}
    if len(floats) == 1:
        whole.pop("torch_dtype", None)
        whole["dtype"] = str(floats.pop()).removeprefix("torch.")
    own = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
    check_names(whole, own)
    write_checkpoint(Path(folder), own, whole)
    return Path(folder)


# ------------------------------------------------------------------------------------------------ what is quantized
def _linear_layers(program: Program) -> list[_Layer]:
    subjects = find_subjects(program)
    if not subjects:
        fix = "run QuantizeWeights or QuantizeDynamic before"
        raise UsageError(581, "the program is not quantized: there is nothing to compress", fix=fix)
    return [_linear_layer(program, subject) for subject in subjects]


def _linear_layer(program: Program, subject: Subject) -> _Layer:
    node = subject.nodes[0]
    module = program.module(node) if node.op == "call_module" else None
    if module is None or layer_kind(program, node) != "linear" or not isinstance(module, nn.Linear):
        why = f"it is a {subject.kind}; the format holds linear layers alone"
        raise UsageError(
            582, "compressed-tensors has no place for a quantized part", where=subject.name, why=why, fix=_FIX
        )
    weight = getattr(module, "weight_fake_quantize", None)
    if not isinstance(weight, FakeQuantize):
        raise UsageError(583, "an input is quantized in front of a float weight", where=subject.name, fix=_FIX)
    data = {subject.inputs[n].get(cast(Node, n.args[0])) for n in subject.nodes}
    others = [a for n in subject.nodes for a in subject.inputs[n] if a is not n.args[0]]
    if len(data) > 1 or others:
        why = "the format has one grid per layer, for its input"
        raise UsageError(
            584, "the inputs of a layer are quantized in several ways", where=subject.name, why=why, fix=_FIX
        )
    return _Layer(subject.name, node, module, weight, data.pop())


def _checked_integers(program: Program, layer: _Layer) -> Integers:
    weight = cast(Tensor, layer.module.weight)
    spec = layer.weight.spec
    if spec.bits > 8 or spec.axis not in (None, 0):
        raise UsageError(585, f"compressed-tensors cannot hold the grid {layer.weight.extra_repr()}", where=layer.name)
    check_groups(weight.shape[1], spec.group_size or -1)
    integers = weight_integers(weight, layer.weight)
    if integers.bits == 8 and integers.zero_point is not None:
        fix = "quantize with symmetric=True, or to 4 bits"
        raise UsageError(586, "8-bit weights with zero points have no kernel in vLLM", where=layer.name, fix=fix)
    return integers


def _float_tensors(program: Program, replaced: set[str]) -> dict[str, Tensor]:
    """What is written as it is: ``state_dict`` without quantizers and without the weights that are written otherwise."""
    quantizers = tuple(f"{n}." for n, m in program.gm.named_modules() if isinstance(m, QUANTIZERS))
    state = program.gm.state_dict()
    return {n: t for n, t in state.items() if n not in replaced and not n.startswith(quantizers)}


# ------------------------------------------------------------------------------------------------ how it is written
def _scheme(layer: _Layer, integers: Integers, format: Format) -> dict[str, Any]:
    group = integers.group_size
    weights = {
        "num_bits": integers.bits,
        "type": "int",
        "symmetric": integers.zero_point is None,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }
    chosen = format if format != "auto" else "pack-quantized" if layer.data is None else "int-quantized"
    if (chosen == "int-quantized") == (layer.data is None):
        kind = "float" if layer.data is None else "quantized"
        what = f"format {format!r} does not suit a layer with {kind} inputs"
        raise UsageError(587, what, where=layer.name, fix="use format='auto'")
    data = None if layer.data is None else _input_scheme(layer)
    return {"weights": weights, "input_activations": data, "output_activations": None, "format": chosen}


def _input_scheme(layer: _Layer) -> dict[str, Any]:
    quantizer = cast(FakeQuantize | DynamicFakeQuantize, layer.data)
    spec = quantizer.spec
    if spec.bits != 8 or spec.axis is not None or spec.steps < 254:
        raise UsageError(588, f"compressed-tensors cannot hold the grid {quantizer.extra_repr()}", where=layer.name)
    found = {"num_bits": 8, "type": "int", "symmetric": spec.symmetric}
    if isinstance(quantizer, FakeQuantize):
        symmetric = bool(spec.symmetric and quantizer.zero_point == (0 if spec.signed else 128))
        return {**found, "symmetric": symmetric, "strategy": "tensor", "group_size": None, "dynamic": False}
    block = quantizer.block
    if block is not None and block < cast(nn.Linear, layer.module).in_features:
        return {**found, "strategy": "group", "group_size": block, "dynamic": True}
    return {**found, "strategy": "token", "group_size": None, "dynamic": True}


def _layer_tensors(layer: _Layer, integers: Integers, format: str) -> dict[str, Tensor]:
    """Of one layer, scales in the dtype of its weight where that changes nothing."""
    if format == "pack-quantized":
        found = to_compressed_tensors(integers.packed())
    else:
        found = {"weight": integers.values, "weight_scale": integers.scale}
        if integers.zero_point is not None:
            found["weight_zero_point"] = integers.zero_point
    found["weight_scale"] = _narrowed(found["weight_scale"], cast(Tensor, layer.module.weight).dtype)
    if isinstance(layer.data, FakeQuantize):
        half = 0 if layer.data.spec.signed else 128
        found["input_scale"] = layer.data.scale.detach().reshape(1)
        zero = layer.data.zero_point.detach().to(torch.int32) - half
        if zero != 0 or not layer.data.spec.symmetric:
            found["input_zero_point"] = zero.to(torch.int8).reshape(1)
    return found


def _narrowed(scale: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = scale.to(dtype)
    return narrow if torch.equal(narrow.to(scale.dtype), scale) else scale


# ------------------------------------------------------------------------------------------------ config.json
def _config(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return json.loads(json.dumps(dict(config), default=str))  # type: ignore[no-any-return]
    if not isinstance(config, (str, os.PathLike)):
        raise UsageError(
            589, f"config cannot be {type(config).__name__}", fix="pass model.config, a mapping, or a folder"
        )
    path = Path(config)
    path = path / CONFIG if path.is_dir() else path
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ArtifactError(333, "the model's configuration cannot be read", where=str(path), why=why) from error


def _settle_ties(config: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> None:
    """Write tied weights once, and say that they are no longer tied when one of them has its own weight now."""
    if not config.get("tie_word_embeddings"):
        return
    seen: dict[int, str] = {}
    for name, tensor in list(tensors.items()):
        first = seen.setdefault(tensor.data_ptr(), name) if name.endswith(".weight") else name
        if first != name and tensors[first].shape == tensor.shape:
            del tensors[name]
    if any(n.startswith(f"{prefix}lm_head.weight") for n in tensors):
        config["tie_word_embeddings"] = False


def _quantization(program: Program, groups: list[dict[str, Any]], layers: list[_Layer], prefix: str) -> dict[str, Any]:
    quantized = {layer.name for layer in layers}
    linear = [n for n, m in program.gm.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix)]
    formats = {group["format"] for group in groups}
    if len(groups) == 1:
        groups[0]["targets"] = ["Linear"]
    return {
        **empty_quantization(),
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [name.removeprefix(prefix) for name in linear if name not in quantized],
    }
