"""Engine and Target: what every engine offers, and the registry of targets."""

from __future__ import annotations

import difflib
import inspect
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor
from torch.fx import Node

from fxcompress.engines.signature import IOSignature
from fxcompress.environment import physical_cores
from fxcompress.errors import MissingRuntimeError, UsageError
from fxcompress.ir import Program
from fxcompress.quant.fake_quantize import QUANTIZERS, FakeQuantize
from fxcompress.quant.scheme import QuantScheme

if TYPE_CHECKING:
    from fxcompress.bench import Latency
    from fxcompress.lowering import PortableModel

__all__ = [
    "Engine", "Runner", "Scratch", "Shapes", "Target", "build_engine", "check_threads", "engine_class", "full_range_weights",
    "nearest", "register", "registered_targets", "require", "scheme_for", "target",
]  # fmt: skip

Runner = Callable[[list[Tensor]], list[Tensor]]
Shapes = tuple[tuple[int, ...], ...]

#: So many shapes get an executable of their own, each when it has come so many times.
FIXED_SHAPES = 4
SEEN_BEFORE_FIXING = 3


class Engine:
    """A model as one runtime executes it: torch tensors in, torch tensors out, in the model's own structure.

    Inputs of any free size run. The shape of the captured example, and up to three further shapes that come three
    times, get an executable for just that shape, which is faster; compiling it delays that one call. Calls from
    several threads are safe. Gradients do not flow through an engine.

    Attributes:
        folder: Where the engine's files lie; a temporary folder that goes away with the engine unless it was loaded.
        signature: Inputs and outputs.
        threads: Threads of one call.
        notes: What was left out or done differently, one line each.
        program: The simulation, when the engine was built in this process; None when it was loaded.
        report: What ``compile`` found out; None when the engine was built directly.
    """

    name: ClassVar[str] = ""

    def __init__(
        self,
        folder: Path,
        signature: IOSignature,
        *,
        threads: int | None = None,
        details: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        program: Program | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.signature = signature
        self.threads = check_threads(threads)
        self.details = dict(details or {})
        self.notes = list(notes)
        self.program = program
        self.report: Any = None
        self._lock = threading.Lock()
        self._fixed: dict[Shapes, Runner] = {}
        self._seen: dict[Shapes, int] = {}
        self._free: Runner | None = None
        self._tapped: dict[tuple[str, ...], Runner] = {}
        self._has_free_sizes = any(isinstance(n, str) for s in signature.tensor_inputs() for n in s.shape)
        self._plain = signature.plain_dtypes()
        self._fix(tuple(s.example for s in signature.tensor_inputs()))

    # ---------------------------------------------------------------------------------------------- calls
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            UsageError: an input is missing, unknown, or of another structure, dtype or size than captured.
            EngineError: the runtime failed.
        """
        runner = None if kwargs else self._known(args)
        if runner is not None:
            return self.signature.restore(runner(list(args)))
        return self.signature.restore(self.run(self.signature.bind(args, kwargs)))

    def _known(self, args: tuple[Any, ...]) -> Runner | None:
        """The executable for plain tensors of dtypes and shapes that were checked before."""
        if len(args) != len(self._plain):
            return None
        for x, dtype in zip(args, self._plain, strict=True):
            if type(x) is not Tensor or x.dtype != dtype:
                return None
        return self._fixed.get(tuple([x.shape for x in args]))

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Flat tensors in, flat tensors out; inputs must have been checked (``signature.bind``)."""
        shapes = tuple(t.shape for t in inputs)
        runner = self._fixed.get(shapes) or self._choose(shapes)
        return runner(inputs)

    def release(self, *, taps_only: bool = False) -> None:
        """Drop the executables, or just that of ``taps``, and their memory; what is needed is loaded again."""
        with self._lock:
            self._tapped = {}
            if taps_only:
                return
            self._fixed, self._free = {}, None
            self._seen = {tuple(tuple(s.example) for s in self.signature.tensor_inputs()): SEEN_BEFORE_FIXING}

    def _choose(self, shapes: Shapes) -> Runner:
        with self._lock:
            if shapes in self._fixed:
                return self._fixed[shapes]
            if len(self._fixed) < FIXED_SHAPES:
                self._seen[shapes] = self._seen.get(shapes, 0) + 1
                if not self._has_free_sizes or self._seen[shapes] >= SEEN_BEFORE_FIXING:
                    self._seen.pop(shapes, None)
                    return self._fix(shapes)
            if self._free is None:
                self._free = self._load(None)
            return self._free

    def _fix(self, shapes: Shapes) -> Runner:
        self._fixed[tuple(tuple(s) for s in shapes)] = runner = self._load(shapes)
        return runner

    def _load(self, shapes: Shapes | None) -> Runner:
        """An executable for inputs of exactly these shapes; for any shapes when None."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until what was called is done; calls of most runtimes are done when they return."""

    # ---------------------------------------------------------------------------------------------- looking inside
    def tap_names(self) -> list[str]:
        """Points inside the model whose values can be read, in execution order."""
        return list(self.details.get("taps", {}))

    def taps(self, names: Sequence[str] | None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Values of inner points for one input.

        Args:
            names: From ``tap_names()``; None for all.
            *args: As in a call.
            **kwargs: As in a call.

        Raises:
            UsageError: a name is not a tapped point.
        """
        wanted = tuple(self.tap_names() if names is None else names)
        unknown = sorted(set(wanted) - set(self.tap_names()))
        if unknown:
            raise UsageError(
                70, f"no tapped point is called {', '.join(unknown)}", fix=nearest(unknown[0], self.tap_names())
            )
        with self._lock:
            if wanted not in self._tapped:
                self._tapped = {wanted: self._load_tapped(wanted)}
            runner = self._tapped[wanted]
        return dict(zip(wanted, runner(self.signature.bind(args, kwargs)), strict=True))

    def _load_tapped(self, names: tuple[str, ...]) -> Runner:
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------- files, speed
    def files(self) -> list[Path]:
        """The engine's own files, the model first."""
        return [self.folder / name for name in self.details["files"]]

    def file_size(self) -> int:
        """Bytes of the engine's files."""
        return sum(path.stat().st_size for path in self.files())

    def save(self, folder: str | Path, *, extra: Mapping[str, bytes | str] | None = None) -> Path:
        """Write the engine with its report and environment into ``folder``; see ``fxcompress.artifact.save``."""
        from fxcompress.artifact import save

        return save(self, folder, extra=extra)

    def benchmark(self, *args: Any, seconds: float = 1.0, runs: int = 20, **kwargs: Any) -> Latency:
        """Latency of a call with these inputs, in this process; see ``fxcompress.bench.measure``."""
        from fxcompress.bench import measure

        inputs = self.signature.bind(args, kwargs)
        return measure(self, inputs, seconds=seconds, runs=runs)

    def worker_job(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """What ``fxcompress.bench_worker`` needs to run this engine on ``inputs``: by default a saved folder."""
        del inputs
        complete = (self.folder / "manifest.json").exists()
        folder = self.folder if complete else self.save(self.folder / "saved")
        return {"runtime": "folder", "model": str(folder), "names": []}

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.signature.usage()}, {self.threads} threads>"


class Target(Protocol):
    """What an engine can run, how it wants it quantized, and how it is built."""

    name: str
    #: Built from the portable (ONNX) form; else from the program itself.
    portable: bool
    #: One of those that ``target=None`` chooses from.
    automatic: bool

    def unmeasured(self) -> str | None:
        """Why latencies of its engines on this machine would tell nothing; None when they are worth measuring."""

    def available(self) -> str | None:
        """None when the runtime is installed, else the pip line."""

    def require(self) -> None:
        """Raise MissingRuntimeError when the runtime is not installed."""

    def scheme(self, flags: frozenset[str] | None = None) -> QuantScheme:
        """How this engine on this processor wants a network quantized.

        Args:
            flags: Processor flags to assume (Linux's spelling); None for this machine's.
        """

    def build(self, model: Program | PortableModel, *, threads: int | None = None) -> Engine:
        """Build an engine.

        Raises:
            MissingRuntimeError: the runtime is not installed.
            EngineError: the runtime refuses the model.
        """


_TARGETS: dict[str, Target] = {}
_ENGINES: dict[str, type[Engine]] = {}


def register(made: Target, engine: type[Engine]) -> None:
    """Make a target known by its name, with the class of its engines."""
    _TARGETS[made.name] = made
    _ENGINES[made.name] = engine


def registered_targets() -> dict[str, Target]:
    """All targets by name."""
    return dict(_TARGETS)


def target(name: str) -> Target:
    """The target of that name. Raises UsageError with the nearest match."""
    if name not in _TARGETS:
        raise UsageError(71, f"unknown target {name!r}", fix=nearest(name, list(_TARGETS)))
    return _TARGETS[name]


def engine_class(name: str) -> type[Engine]:
    """The class of the engines of a target."""
    target(name)
    return _ENGINES[name]


def require(made: Target) -> None:
    """Raise MissingRuntimeError when the runtime of a target is not installed."""
    line = made.available()
    if line is not None:
        raise MissingRuntimeError(2, f"the runtime of target {made.name!r} is not installed", fix=line)


def nearest(name: str, known: Sequence[str]) -> str:
    """``did you mean ...`` or the known names."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known[:20])}"


def scheme_for(made: Target, options: Mapping[str, Any]) -> QuantScheme:
    """The target's scheme when its engine is built with these options, e.g. ``providers``."""
    known = inspect.signature(made.scheme).parameters
    return made.scheme(**{name: value for name, value in options.items() if name in known})


def build_engine(made: Target, program: Program, **options: Any) -> Engine:
    """Build an engine of ``program``, through its portable form where the target wants that."""
    from fxcompress.lowering import lower

    return made.build(lower(program) if made.portable else program, **options)


def check_threads(threads: int | None) -> int:
    """The number of threads to use; raises UsageError for less than one."""
    if threads is None:
        return physical_cores()
    if threads < 1:
        raise UsageError(72, f"an engine cannot run on {threads} threads", fix="give at least 1, or None for all cores")
    return int(threads)


def full_range_weights(program: Program) -> bool:
    """True when integers are multiplied by weights of more than 7 bits: such products only add up with `has_vnni`."""
    quantizers = [n for n, m in program.layers() if isinstance(m, QUANTIZERS)]
    dynamic = any(getattr(m, "dynamic", False) for m in program.gm.modules())
    if not dynamic and not any(isinstance(n.args[0], Node) and n.args[0].op != "get_attr" for n in quantizers):
        return False  # activations stay float
    grids = [m.spec for m in program.gm.modules() if isinstance(m, FakeQuantize)]
    return any(grid.signed and grid.symmetric and grid.steps > 127 for grid in grids)


class Scratch:
    """A temporary folder that is removed when its owner is garbage-collected."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fxcompress-"))

    def give_to(self, owner: object) -> None:
        """Remove the folder when ``owner`` goes away."""
        weakref.finalize(owner, shutil.rmtree, self.path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder now."""
        shutil.rmtree(self.path, ignore_errors=True)
