"""Structure: nested tuples, lists, dicts and records around tensors, as a value that is plain JSON.

A type is never imported because a file names it: a named tuple, dataclass or model output comes back as that very type
only when the running program has already imported it and its fields are the same; otherwise as a generic ``Output``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fxcompress.errors import ArtifactError, UsageError

__all__ = ["Leaf", "Output", "Structure", "describe"]


@dataclass(frozen=True)
class Leaf:
    """The place of flattened value number ``index``."""

    index: int


class Output(Mapping[str, Any]):
    """A record whose own type is not at hand: fields by attribute, by key, or by position."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)

    def __getitem__(self, key: str | int) -> Any:
        return list(self.__dict__.values())[key] if isinstance(key, int) else self.__dict__[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)

    def __repr__(self) -> str:
        return f"Output({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"


@dataclass(frozen=True)
class Structure:
    """One level of a structure.

    Attributes:
        kind: ``leaf``, ``constant``, ``tuple``, ``list``, ``dict``, ``namedtuple`` or ``dataclass``.
        items: The parts, in order.
        keys: Keys of a dict, field names of a record.
        type_name: ``module:qualname`` of a record's type.
        value: The index of a leaf, or the constant.
    """

    kind: str
    items: tuple[Structure, ...] = ()
    keys: tuple[Any, ...] = ()
    type_name: str = ""
    value: Any = None
    type: Any = dataclasses.field(default=None, compare=False, repr=False)

    def build(self, leaves: list[Any]) -> Any:
        """The structure around ``leaves``."""
        if self.kind == "leaf":
            return leaves[self.value]
        if self.kind == "constant":
            return self.value
        parts = [item.build(leaves) for item in self.items]
        if self.kind in ("tuple", "list"):
            return tuple(parts) if self.kind == "tuple" else parts
        fields = dict(zip(self.keys, parts, strict=True))
        if self.kind == "dict":
            return fields
        record = self.type or _find_type(self.type_name, self.kind, self.keys)
        if record is None:
            return Output(fields)
        return record(parts) if _is_sequence_type(record) else record(**fields)

    def flatten(self, value: Any, where: str) -> list[Any]:
        """Leaves of ``value`` in order; raises UsageError when it is not built like this."""
        if self.kind == "leaf":
            return [value]
        if self.kind == "constant":
            return []
        found: list[Any] = []
        for key, part, item in zip(
            self.keys or range(len(self.items)), self._parts(value, where), self.items, strict=True
        ):
            found += item.flatten(part, f"{where}[{key!r}]")
        return found

    def _parts(self, value: Any, where: str) -> list[Any]:
        problem = ""
        if self.kind in ("tuple", "list", "namedtuple"):
            if not isinstance(value, (tuple, list)) or len(value) != len(self.items):
                problem = f"expected {len(self.items)} values"
            else:
                return list(value)
        elif self.kind == "dict":
            if not isinstance(value, Mapping) or set(value) != set(self.keys):
                problem = f"expected a dict with the keys {list(self.keys)}"
            else:
                return [value[k] for k in self.keys]
        elif not all(hasattr(value, k) for k in self.keys):
            problem = f"expected a record with the fields {list(self.keys)}"
        else:
            return [getattr(value, k) for k in self.keys]
        raise UsageError(66, f"{where}: {problem}", why=f"got a {type(value).__name__}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        d: dict[str, Any] = {"kind": self.kind}
        if self.kind in ("leaf", "constant"):
            return d | {"value": self.value}
        d["items"] = [item.to_json() for item in self.items]
        if self.keys:
            d["keys"] = list(self.keys)
        return d | ({"type": self.type_name} if self.type_name else {})

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Structure:
        """Inverse of ``to_json``."""
        if d["kind"] not in ("leaf", "constant", "tuple", "list", "dict", "namedtuple", "dataclass"):
            raise ArtifactError(26, f"unknown structure {d['kind']!r} in the manifest")
        items = tuple(cls.from_json(i) for i in d.get("items", ()))
        return cls(str(d["kind"]), items, tuple(d.get("keys", ())), str(d.get("type", "")), d.get("value"))


def describe(value: Any) -> Structure:
    """The Structure of nested containers whose ends are Leaf objects or plain constants."""
    if isinstance(value, Leaf):
        return Structure("leaf", value=value.index)
    kind = type(value)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return Structure("namedtuple", _describe_all(value), tuple(value._fields), name, type=kind)
    if _is_sequence_type(kind):
        return Structure("namedtuple", _describe_all(value), _fields(kind) or (), name, type=kind)
    if isinstance(value, (tuple, list)):
        return Structure("tuple" if isinstance(value, tuple) else "list", _describe_all(value))
    if dataclasses.is_dataclass(value):
        # A model output leaves out the fields that are None; a plain dataclass has them all.
        keys = tuple(value.keys()) if isinstance(value, Mapping) else tuple(f.name for f in dataclasses.fields(value))
        return Structure("dataclass", _describe_all(getattr(value, k) for k in keys), keys, name, type=kind)
    if isinstance(value, Mapping):
        return Structure("dict", _describe_all(value.values()), tuple(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return Structure("constant", value=value)
    raise UsageError(67, f"a value of type {kind.__name__} cannot be part of an engine's inputs or outputs")


def _describe_all(values: Any) -> tuple[Structure, ...]:
    return tuple(describe(v) for v in values)


def _is_sequence_type(kind: type) -> bool:
    """True for what ``torch.topk`` and its like return: named tuples written in C, made from one sequence."""
    return issubclass(kind, tuple) and hasattr(kind, "n_sequence_fields")


def _fields(kind: Any) -> tuple[str, ...] | None:
    """Field names of a named tuple."""
    found = kind.__match_args__ if _is_sequence_type(kind) else getattr(kind, "_fields", None)
    return None if found is None else tuple(found)


def _find_type(name: str, kind: str, keys: tuple[Any, ...]) -> Any:
    """The record type ``name`` if the program has already imported it and it has these fields; else None."""
    module_name, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        found = vars(found).get(part) if found is not None and hasattr(found, "__dict__") else None
    if not isinstance(found, type):
        return None
    if kind == "namedtuple":
        return found if issubclass(found, tuple) and _fields(found) == keys else None
    if not dataclasses.is_dataclass(found):
        return None
    fields = {f.name for f in dataclasses.fields(found)}
    return found if set(keys) <= fields and (issubclass(found, Mapping) or set(keys) == fields) else None
