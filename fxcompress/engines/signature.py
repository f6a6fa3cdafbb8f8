"""IOSignature: what an engine takes and gives, checked at each call and writable as plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.engines.structure import Leaf, Structure, describe
from fxcompress.errors import UsageError
from fxcompress.ir import Program
from fxcompress.lowering.names import input_names, output_names, size_names

__all__ = ["IOSignature", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor input or output.

    Attributes:
        name: In the engine's file and in errors.
        dtype: Name of the torch dtype, e.g. ``"float32"``.
        shape: A number, or the name of a free size, per dimension.
        example: The shape of the captured example (inputs only).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    example: tuple[int, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class IOSignature:
    """How an engine is called and what it returns.

    Attributes:
        names: Top-level inputs; the first ``n_positional`` may be given by position.
        n_positional: How many of them.
        inputs: Every flattened input: a TensorSpec, or a constant the call was captured with.
        in_tree: Structure of ``(args, kwargs)``.
        outputs: Every flattened output: a TensorSpec, or a constant.
        out_tree: Structure of the output.
    """

    names: tuple[str, ...]
    n_positional: int
    inputs: tuple[Any, ...]
    in_tree: Structure
    outputs: tuple[Any, ...]
    out_tree: Structure

    @classmethod
    def of(cls, program: Program) -> IOSignature:
        """The signature of a program."""
        sizes = size_names(program)
        s = program.signature
        example = s.flatten(*program.example)
        placeholders = [n.meta.get("val") for n in program.placeholders()]
        inputs = [
            _spec(name, val, sizes, tuple(given.shape) if isinstance(given, Tensor) else ())
            for name, val, given in zip(input_names(program), placeholders, example, strict=True)
        ]
        results = [getattr(o, "meta", {}).get("val", o) for o in program.outputs()]
        outputs = [_spec(name, val, sizes, ()) for name, val in zip(output_names(program), results, strict=True)]
        trees = (_tree(s.in_spec), _tree(s.out_spec))
        return cls(s.names, s.n_positional, tuple(inputs), trees[0], tuple(outputs), trees[1])

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call in the engine's order.

        Raises:
            UsageError: an input is missing, unknown, of another structure, dtype, rank or size than captured.
        """
        leaves = self.in_tree.flatten(self._arranged(args, kwargs), "inputs")
        if len(leaves) != len(self.inputs):
            raise UsageError(
                61, "the structure of the inputs is not the captured one", why=str(self.in_tree), fix=self.usage()
            )
        sizes: dict[str, tuple[int, str]] = {}
        return [_checked(s, v, sizes) for s, v in zip(self.inputs, leaves, strict=True) if _is_tensor_input(s, v)]

    def _arranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and len(args) == self.n_positional == len(self.names):
            return args, kwargs
        bound = dict(zip(self.names, args, strict=False))
        trouble = _trouble(self.names, args, bound, kwargs)
        if trouble:
            raise UsageError(60, f"inputs do not fit the captured call: {trouble}", fix=self.usage())
        bound |= kwargs
        cut = self.n_positional
        return tuple(bound[n] for n in self.names[:cut]), {n: bound[n] for n in self.names[cut:]}

    def restore(self, tensors: Sequence[Tensor]) -> Any:
        """The model's own output structure around the engine's tensors."""
        rest = iter(tensors)
        return self.out_tree.build([next(rest) if isinstance(s, TensorSpec) else s for s in self.outputs])

    def usage(self) -> str:
        """How to call the engine, for errors."""
        tensors = [f"{s.name}: {s}" for s in self.inputs if isinstance(s, TensorSpec)]
        return f"call it as engine({', '.join(self.names)}) with {', '.join(tensors)}"

    def tensor_inputs(self) -> list[TensorSpec]:
        """The inputs that are tensors, in the engine's order."""
        return [s for s in self.inputs if isinstance(s, TensorSpec)]

    def tensor_outputs(self) -> list[TensorSpec]:
        """The outputs that are tensors, in the engine's order."""
        return [s for s in self.outputs if isinstance(s, TensorSpec)]

    def plain_dtypes(self) -> list[torch.dtype]:
        """Dtypes of the inputs when each is a tensor given by position; else empty."""
        specs = self.tensor_inputs()
        if not len(specs) == len(self.inputs) == len(self.names) == self.n_positional:
            return []
        marks = [object() for _ in specs]
        try:
            plain = self.in_tree.flatten((tuple(marks), {}), "inputs") == marks
        except UsageError:
            plain = False
        return [s.torch_dtype for s in specs] if plain else []

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        sides = {side: [_leaf_json(s) for s in getattr(self, side)] for side in ("inputs", "outputs")}
        trees = {"in_tree": self.in_tree.to_json(), "out_tree": self.out_tree.to_json()}
        return {"names": list(self.names), "n_positional": self.n_positional, **sides, **trees}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> IOSignature:
        """Inverse of ``to_dict``."""
        inputs, outputs = (tuple(_leaf_from(s) for s in d[side]) for side in ("inputs", "outputs"))
        trees = [Structure.from_json(d[k]) for k in ("in_tree", "out_tree")]
        return cls(tuple(d["names"]), int(d["n_positional"]), inputs, trees[0], outputs, trees[1])


def _tree(spec: pytree.TreeSpec) -> Structure:
    return describe(pytree.tree_unflatten([Leaf(i) for i in range(spec.num_leaves)], spec))


def _spec(name: str, val: Any, sizes: dict[str, str], example: tuple[int, ...]) -> Any:
    if not isinstance(val, Tensor):
        return val
    shape = tuple(s if isinstance(s, int) else sizes.get(str(s), str(s)) for s in val.shape)
    return TensorSpec(name, str(val.dtype).removeprefix("torch."), shape, example)


def _trouble(names: tuple[str, ...], args: tuple[Any, ...], bound: dict[str, Any], kwargs: dict[str, Any]) -> str:
    found = {
        "missing": [n for n in names if n not in bound and n not in kwargs],
        "unknown": [n for n in kwargs if n not in names],
        "given twice": sorted(set(bound) & set(kwargs)),
        "too many positional": ["" for _ in args[len(names) :]],
    }
    return "; ".join(f"{what} {', '.join(which)}".strip() for what, which in found.items() if which)


def _is_tensor_input(spec: Any, value: Any) -> bool:
    if isinstance(spec, TensorSpec):
        return True
    if value is not spec and value != spec:
        raise UsageError(
            62, f"an input was captured as the constant {spec!r}, now it is {value!r}", fix="capture the model again"
        )
    return False


def _checked(spec: TensorSpec, value: Any, sizes: dict[str, tuple[int, str]]) -> Tensor:
    if not isinstance(value, Tensor):
        fix = "torch.from_numpy(array)" if type(value).__module__ == "numpy" else ""
        raise UsageError(
            63, f"input {spec.name} must be a tensor", why=f"expected {spec}, got a {type(value).__name__}", fix=fix
        )
    shape = value.shape
    if value.dtype != spec.torch_dtype or len(shape) != len(spec.shape):
        raise _mismatch(spec, value)
    for want, got in zip(spec.shape, shape, strict=True):
        if isinstance(want, int):
            if want != got:
                raise _mismatch(spec, value)
        elif want.isidentifier():
            seen = sizes.setdefault(want, (got, spec.name))
            if seen[0] != got:
                raise _mismatch(spec, value, f"size {want!r} is {seen[0]} in input {seen[1]}")
    return value


def _mismatch(spec: TensorSpec, value: Tensor, why: str = "") -> UsageError:
    got = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    convert = value.dtype != spec.torch_dtype
    fix = (
        f"convert it: {spec.name}.to(torch.{spec.dtype})"
        if convert
        else "free sizes have a name; capture again to change others"
    )
    return UsageError(64, f"input {spec.name} does not fit: expected {spec}, got {got}", why=why, fix=fix)


def _leaf_json(spec: Any) -> dict[str, Any]:
    if isinstance(spec, TensorSpec):
        return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "example": list(spec.example)}
    if spec is None or isinstance(spec, (bool, int, float, str)):
        return {"constant": spec}
    raise UsageError(
        65, f"an input or output of type {type(spec).__name__} cannot be saved", fix="return tensors from forward"
    )


def _leaf_from(d: dict[str, Any]) -> Any:
    if "constant" in d:
        return d["constant"]
    return TensorSpec(str(d["name"]), str(d["dtype"]), tuple(d["shape"]), tuple(d["example"]))
