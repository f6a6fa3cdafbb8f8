"""The contract of a pass: what it takes, what it gives back, and what is checked around it."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fxcompress.data import CalibrationData
from fxcompress.errors import FxcError, PassError
from fxcompress.ir import Program

if TYPE_CHECKING:
    from fxcompress.quant.scheme import QuantScheme

__all__ = [
    "Context",
    "Pass",
    "Refusal",
    "Result",
    "exact_tolerance",
    "fingerprint",
    "output_error",
    "register_pass",
    "registered_passes",
]

#: Largest output difference an exact pass may cause, relative to the largest output: a few hundred roundings, because
#: folding scales and reordering sums rounds anew.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_REGISTRY: dict[str, type[Pass]] = {}


@dataclass(frozen=True)
class Refusal:
    """A rule that matched but may not be applied: which, where, why."""

    rule: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.node}: {self.reason}"


@dataclass
class Context:
    """What a pass may need besides the program.

    Attributes:
        calibration: Iterable of batches (see ``fxcompress.data``), or None. A one-shot iterator is wrapped, so that
            several passes can read it.
        train: Iterable of training batches with labels, for importance by gradients, or None.
        loss: ``loss(output, batch) -> scalar``; None for cross-entropy against an integer label.
        scheme: How the target wants values quantized, or None for no target.
        verify: Compare outputs before and after each pass.
        reference: The float program, for passes that compare with it. Without one a pipeline gives its passes the last of
            its programs that had no quantizers yet.
    """

    calibration: Iterable[Any] | None = None
    train: Iterable[Any] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    scheme: QuantScheme | None = None
    verify: bool = True
    reference: Program | None = None

    def __post_init__(self) -> None:
        if isinstance(self.calibration, Iterator):
            self.calibration = CalibrationData(self.calibration)


@dataclass
class Result:
    """What a pass did.

    Attributes:
        program: The rewritten program (the input program is untouched).
        changes: One line per rewrite.
        refusals: Rules that matched and did not apply.
        notes: What the user should know: layers left alone, data that was short.
        metrics: Numbers of the pass, for the report.
        modified: Computed from a fingerprint by the contract, not claimed by the pass.
        error: Largest output difference on the example, relative to the largest output; None when not measured.
        seconds: Wall time, checks included.
        outputs: Flat outputs of ``program`` on its example; None when they were not computed.
        reference: Of a pipeline, the last of its programs without quantizers that no pass wrote over.
    """

    program: Program
    changes: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    modified: bool = False
    error: float | None = None
    seconds: float = 0.0
    outputs: list[Any] | None = None
    reference: Program | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a program. Subclasses are frozen dataclasses: their fields are their configuration.

    Attributes:
        exact: True when the outputs must stay the same; False when the error is measured and reported.
    """

    exact: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_pass(cls)

    @property
    def name(self) -> str:
        """Class name, as in recipes and dumps."""
        return type(self).__name__

    @property
    def precision(self) -> str:
        """What reports call a program behind this pass, e.g. ``int8``; "" when it does not quantize."""
        return ""

    @property
    def writes_input(self) -> bool:
        """True when the pass was asked to write into the tensors of its input, to save memory."""
        return False

    def requires(self, program: Program, context: Context) -> None:
        """Raise PassError when the pass cannot work on this program or lacks data."""
        del program, context

    @abstractmethod
    def run(self, program: Program, context: Context) -> Result:
        """Rewrite ``program`` (already a clone, whose tensors are shared) and say what was done."""

    def ensures(self, before: Program, after: Program) -> None:
        """Raise PassError when a promise of this pass was broken."""
        del before, after

    def to_dict(self) -> dict[str, Any]:
        """Recipe entry: the name and every field, in JSON's own types where the fields allow it."""
        return {"name": self.name, **{f.name: _entry(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    @staticmethod
    def from_dict(entry: dict[str, Any]) -> Pass:
        """The pass a recipe entry describes. Raises PassError for an unknown name or option, or a missing one."""
        fields = dict(entry)
        name = str(fields.pop("name", ""))
        if name not in _REGISTRY:
            raise PassError(10, f"unknown pass {name!r}", fix=f"known passes: {', '.join(sorted(_REGISTRY))}")
        known = {f.name for f in dataclasses.fields(_REGISTRY[name]) if f.init}
        unknown = sorted(set(fields) - known)
        if unknown:
            fix = f"its options: {', '.join(sorted(known)) or 'none'}"
            raise PassError(11, f"{name} has no option {', '.join(unknown)}", fix=fix)
        try:
            return _REGISTRY[name](**{k: _field_value(v) for k, v in fields.items()})
        except TypeError as error:
            raise PassError(12, f"{name} cannot be made from its recipe entry", why=str(error)) from error

    def __call__(self, program: Program, context: Context | None = None, outputs: list[Any] | None = None) -> Result:
        """Run under the contract: on a clone, normal form before and after, outputs compared, time taken.

        Args:
            program: Left untouched.
            context: Data and target.
            outputs: Outputs of ``program`` on its example when already known.

        Raises:
            PassError: a requirement is missing, the pass failed, changed its input, or claims to be exact and changed
                the outputs.
        """
        context = context or Context()
        start = time.perf_counter()
        before = fingerprint(program)
        if context.verify and outputs is None:
            outputs = program.run_example()
        with self._guard():
            self.requires(program, context)
            result = self.run(program.clone(), context)
            result.program.recompile()
            result.program.verify()
            self.ensures(program, result.program)
        if not self.writes_input and _tensor_states(program) != before[1]:
            why = "a clone shares its tensors with the program it came from"
            raise PassError(
                3, f"pass {self.name} wrote into its input", why=why, fix="put new tensors, never write in place"
            )
        result.modified = fingerprint(result.program) != before
        self._compare(context, result, outputs)
        result.seconds = time.perf_counter() - start
        return result

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except FxcError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise PassError(
                1, f"pass {self.name} failed", why=why, fix="report this model; the input is untouched"
            ) from error

    def _compare(self, context: Context, result: Result, expected: list[Any] | None) -> None:
        """Fill ``outputs`` and ``error``; what an exact pass may not change must be as before."""
        if not result.modified:
            result.outputs, result.error = expected, 0.0
            return
        result.outputs, result.error = None, None
        if not context.verify or expected is None:
            return
        result.outputs = self._run_example(result)
        result.error = output_error(expected, result.outputs)
        tolerance = exact_tolerance(result.program, expected)
        if self.exact and not result.error <= tolerance:
            raise PassError(
                2,
                f"pass {self.name} changed the outputs (relative error {result.error:.3g})",
                where=result.changes[0] if result.changes else "",
                why=f"an exact pass must keep them (tolerance {tolerance:.0e})",
                fix="find the first bad pass with Pipeline.bisect",
            )

    def _run_example(self, result: Result) -> list[Any]:
        try:
            return result.program.run_example()
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise PassError(
                4,
                f"the program does not run any more after pass {self.name}",
                where=result.changes[0] if result.changes else "",
                why=f"{type(error).__name__}: {error}",
                fix="report this model; the input is untouched",
            ) from error


def register_pass(cls: type[Pass]) -> None:
    """Make a pass known to recipes by its class name.

    Raises:
        PassError: another class has that name already. The same class defined again (a notebook cell, a reloaded
            module) and classes defined in functions are replaced.
    """
    if inspect.isabstract(cls):
        return
    known = _REGISTRY.get(cls.__name__)
    again = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
    if known is not None and not again and "<locals>" not in known.__qualname__:
        where = f"{cls.__module__}.{cls.__qualname__}"
        why = f"{known.__module__}.{known.__qualname__} has this name, and recipes know passes by name"
        raise PassError(13, f"there is already a pass {cls.__name__}", where=where, why=why, fix="rename the class")
    _REGISTRY[cls.__name__] = cls


def registered_passes() -> dict[str, type[Pass]]:
    """All passes by name."""
    return dict(_REGISTRY)


def _entry(value: Any) -> Any:
    """A field as a recipe holds it: lists for tuples, entries for passes."""
    if isinstance(value, Pass):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_entry(v) for v in value]
    if isinstance(value, dict):
        return {k: _entry(v) for k, v in value.items()}
    return value


def _field_value(value: Any) -> Any:
    """Inverse of `_entry`."""
    if isinstance(value, (list, tuple)):
        return tuple(_field_value(v) for v in value)
    if isinstance(value, dict):
        return Pass.from_dict(value) if "name" in value else {k: _field_value(v) for k, v in value.items()}
    return value


def fingerprint(program: Program) -> tuple[Any, ...]:
    """Identity of a program: its text and its tensors (by object and version)."""
    return program.text(), _tensor_states(program)


def _tensor_states(program: Program) -> tuple[tuple[str, int, int], ...]:
    gm = program.gm
    tensors = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    return tuple((name, id(t), t._version) for name, t in tensors)


def exact_tolerance(program: Program, outputs: list[Any]) -> float:
    """Largest relative output difference an exact pass may cause, for the coarsest float dtype in the program."""
    tensors = [*program.gm.parameters(), *program.gm.buffers(), *outputs]
    found = {t.dtype for t in tensors if isinstance(t, Tensor)}
    return max((_TOLERANCES[d] for d in found if d in _TOLERANCES), default=_TOLERANCES[torch.float32])


def output_error(expected: list[Any], got: list[Any]) -> float:
    """Largest ``max|a - b| / max|a|`` over the outputs, in float64; infinite when shapes, kinds or their number differ."""
    if len(expected) != len(got):
        return math.inf
    return max((_relative(a, b) for a, b in zip(expected, got, strict=True)), default=0.0)


def _relative(a: Any, b: Any) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if type(a) is type(b) and a == b else math.inf
    if a.shape != b.shape:
        return math.inf
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    a64, b64 = _real64(a), _real64(b)
    same = (a64 == b64) | (a64.isnan() & b64.isnan())
    difference = torch.where(same, torch.zeros_like(a64), (a64 - b64).abs()).max().item()
    finite = a64[a64.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    return math.inf if math.isnan(difference) else difference / max(scale, 1e-12)


def _real64(value: Tensor) -> Tensor:
    plain = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return plain.detach().to(torch.float64)
