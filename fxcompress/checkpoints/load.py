"""`load_compressed_tensors`: a checkpoint's weights and grids on a captured float program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.checkpoints.folder import Reader
from fxcompress.errors import ArtifactError, UsageError
from fxcompress.ir import Program
from fxcompress.kernels.imports import PackedWeight, from_compressed_tensors, from_int_quantized
from fxcompress.quant.fake_quantize import QUANTIZERS, DynamicFakeQuantize, FakeQuantize
from fxcompress.quant.insertion import add_quantizer
from fxcompress.quant.layer_weights import attach_quantizer, put_weight
from fxcompress.quant.placement import layer_kind, layer_name
from fxcompress.quant.spec import QuantSpec

__all__ = ["load_compressed_tensors"]

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")


def load_compressed_tensors(program: Program, folder: str | Path, *, prefix: str = "") -> Program:
    """A quantized program from a float one of the same architecture and a checkpoint with 4- or 8-bit integer weights.

    Inputs quantized at run time get this package's scale, ``max|x| / 127`` (other loaders divide by 127.5).

    Args:
        program: Captured from the model before quantization; left untouched.
        folder: With ``model.safetensors`` (or parts and an index) and ``config.json``.
        prefix: What stands in front of every name in the program and not in the checkpoint.

    Returns:
        The program with the checkpoint's tensors, ready to be lowered.

    Raises:
        UsageError: the program is quantized already; the checkpoint's weights have a form that no grid here has
            (floats, reordered groups, 8 bits with zero points).
        ArtifactError: the checkpoint is damaged, or does not fit the program.
    """
    if any(isinstance(m, QUANTIZERS) for m in program.gm.modules()):
        raise UsageError(590, "the program is quantized already", fix="capture the float model again")
    reader = Reader(Path(folder))
    form = str((reader.config.get("quantization_config") or {}).get("format"))
    if form not in (*_FORMATS, "mixed-precision"):
        why = f"its format is {form}"
        raise UsageError(
            591, "the checkpoint holds no integer weights of compressed-tensors", where=str(folder), why=why
        )
    new = program.clone()
    layers = _linear_nodes(new)
    quantized: set[str] = set()
    grids: dict[tuple[Node, str], Node] = {}
    for module, parts in reader.modules():
        if "weight_scale" not in parts:
            continue
        name = prefix + module
        if name not in layers:
            raise ArtifactError(334, "a quantized layer of the checkpoint is not in the program", where=module)
        nodes = layers[name]
        tensors = {leaf: reader.read(full) for leaf, full in parts.items()}
        scheme = _scheme_of(reader.config["quantization_config"], module)
        _put_weight(new, nodes, _packed(tensors, scheme))
        _put_input(new, nodes, scheme, tensors, grids)
        quantized |= {prefix + full for leaf, full in parts.items() if leaf != "bias"} | {f"{name}.weight"}
    _put_floats(new, reader, prefix, quantized)
    new.recompile()
    new.verify()
    return new


def _linear_nodes(program: Program) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_module" and layer_kind(program, node) == "linear":
            found.setdefault(layer_name(node), []).append(node)
    return found


def _scheme_of(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The group whose targets name the layer, else the one for all linear layers."""
    groups = list(config["config_groups"].values())
    named = [g for g in groups if module in g["targets"]]
    return cast(Mapping[str, Any], (named or [g for g in groups if "Linear" in g["targets"]] or groups)[0])


def _packed(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> PackedWeight:
    scale = tensors["weight_scale"].float()
    if "weight_packed" in tensors:
        shape = [int(n) for n in tensors["weight_shape"]]
        scale = scale.reshape(-1, 1).expand(shape[0], 1) if scale.numel() == 1 else scale.reshape(shape[0], -1)
        parts = (tensors.get("weight_zero_point"), tensors.get("weight_g_idx"))
        bits = int(scheme["weights"]["num_bits"])
        return from_compressed_tensors(tensors["weight_packed"], scale, shape, *parts, bits=bits)
    weight = tensors["weight"]
    if weight.dtype != torch.int8:
        raise UsageError(592, f"the weights of the checkpoint are {weight.dtype}", fix="save integers of 4 or 8 bits")
    zero = tensors.get("weight_zero_point")
    if zero is not None and bool((zero != 0).any()):
        raise UsageError(593, "unpacked weights of the checkpoint have zero points", fix="save them pack-quantized")
    rows = weight.shape[0]
    return from_int_quantized(
        weight, scale.reshape(-1, 1).expand(rows, 1) if scale.numel() == 1 else scale.reshape(rows, -1)
    )


def _put_weight(program: Program, nodes: list[Node], packed: PackedWeight) -> None:
    """Give a layer the weight and its grid."""
    if packed.permutation is not None:
        fix = "save it without activation ordering of the groups"
        raise UsageError(594, "the groups of a weight are reordered", where=str(nodes[0].target), fix=fix)
    rows, groups = packed.scales.shape[1], packed.scales.shape[0]
    symmetric, half = packed.zeros is None, 1 << (packed.bits - 1)
    values = packed.integers().to(torch.int32)
    scale = packed.scales.T.float().contiguous()
    zero = packed.zero_points().to(torch.int32).T.contiguous()
    real = ((values.unflatten(1, (groups, -1)) - zero[..., None]) * scale[..., None]).reshape(rows, -1)
    size = None if groups == 1 else packed.features // groups
    quantizer = FakeQuantize(QuantSpec(packed.bits, signed=symmetric, symmetric=symmetric, axis=0, group_size=size))
    quantizer.scale = scale[:, 0].clone() if groups == 1 else scale
    zero = zero - half if symmetric else zero
    quantizer.zero_point = zero[:, 0].clone() if groups == 1 else zero
    layer = program.module(nodes[0])
    if cast(Tensor, layer.weight).shape != real.shape:
        why = f"{list(real.shape)} in the checkpoint, {list(cast(Tensor, layer.weight).shape)} in the program"
        raise ArtifactError(335, "a weight has another shape", where=str(nodes[0].target), why=why)
    put_weight(program, nodes[:1], real)
    attach_quantizer(program, nodes[0], quantizer)


def _put_input(
    program: Program,
    nodes: list[Node],
    scheme: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    grids: dict[tuple[Node, str], Node],
) -> None:
    """Round what a layer reads; layers with one input and one grid share the quantizer."""
    wanted = scheme.get("input_activations")
    if wanted is None:
        return
    quantizer = _input_quantizer(wanted, tensors, str(nodes[0].target))
    for node in nodes:
        value = cast(Node, node.args[0])
        key = f"{quantizer.extra_repr()} {getattr(quantizer, 'scale', '')} {getattr(quantizer, 'zero_point', '')}"
        if (value, key) not in grids:
            path = add_quantizer(program, f"{value.name}_{len(grids)}", quantizer)
            anchor = value if value.op != "placeholder" else program.placeholders()[-1]
            with program.graph.inserting_after(anchor):
                new = program.graph.create_node("call_module", path, (value,), {}, name=f"{value.name}_quantized")
            new.meta = dict(value.meta)
            grids[value, key] = new
        arguments: tuple[Any, ...] = (grids[value, key], *node.args[1:])
        node.args = arguments


def _input_quantizer(
    wanted: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> FakeQuantize | DynamicFakeQuantize:
    strategy, dynamic = wanted.get("strategy"), bool(wanted.get("dynamic"))
    known = wanted["num_bits"] == 8 and wanted.get("type", "int") == "int"
    if known and dynamic and strategy in ("token", "group") and wanted.get("symmetric", True):
        block = wanted.get("group_size") if strategy == "group" else None
        return DynamicFakeQuantize(QuantSpec(8, signed=True, symmetric=True, qmin=-127), block)
    if not known or dynamic or strategy != "tensor" or "input_scale" not in tensors:
        why = f"{wanted.get('num_bits')} bits, {wanted.get('type')}, per {strategy}, dynamic={dynamic}"
        raise UsageError(
            595, "the inputs of a layer are quantized in a way that has no grid here", where=where, why=why
        )
    quantizer = FakeQuantize(QuantSpec(8, signed=False, symmetric=False))
    zero = tensors.get("input_zero_point", torch.zeros(1))
    quantizer.scale = tensors["input_scale"].float().reshape(())
    quantizer.zero_point = zero.to(torch.int32).reshape(()) + 128
    return quantizer


# ------------------------------------------------------------------------------------------------ what stays float
def _put_floats(program: Program, reader: Reader, prefix: str, done: set[str]) -> None:
    """Replace parameters and buffers; none is written into."""
    places = _places(program)
    given = {prefix + n: n for n in reader.names if prefix + n not in done and not n.endswith(("k_scale", "v_scale"))}
    unknown = sorted(set(given) - set(places))
    if unknown:
        raise ArtifactError(336, "a tensor of the checkpoint is not in the program", where=unknown[0])
    shared: dict[int, list[str]] = {}
    for name, (holder, leaf) in places.items():
        shared.setdefault(id(getattr(holder, leaf)), []).append(name)
    missing = []
    for names in shared.values():
        own = [n for n in names if n in given]
        left = [n for n in names if n not in given and n not in done]
        if left and not own:
            missing += left
        for name in names:
            source = name if name in given else own[0] if own and name not in done else None
            if source is not None:
                _put(places[name], reader.read(given[source]), name)
    if missing:
        raise ArtifactError(337, "the checkpoint lacks tensors of the program", where=", ".join(missing[:3]))


def _places(program: Program) -> dict[str, tuple[nn.Module, str]]:
    """Name of every float tensor of ``state_dict`` -> the module that holds it and its name there."""
    quantizers = tuple(f"{n}." for n, m in program.gm.named_modules() if isinstance(m, QUANTIZERS))
    found = {}
    for name in program.gm.state_dict():
        if not name.startswith(quantizers):
            path, _, leaf = name.rpartition(".")
            found[name] = (program.gm.get_submodule(path), leaf)
    return found


def _put(place: tuple[nn.Module, str], value: Tensor, name: str) -> None:
    holder, leaf = place
    old = cast(Tensor, getattr(holder, leaf))
    if old.shape != value.shape:
        why = f"{list(value.shape)} in the checkpoint, {list(old.shape)} in the program"
        raise ArtifactError(338, "a tensor of the checkpoint has another shape", where=name, why=why)
    new = value.to(old.dtype).to(old.device)
    setattr(holder, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
