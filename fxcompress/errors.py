"""The one error family of fxcompress.

Every error has a stable id (``FXC-CAPTURE-001``) and says, in this order: what happened, where (node and the user's
``file:line``), why, and what to do. Nothing else is raised for a user's mistake or an unsupported model.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CaptureError",
    "CertificateError",
    "EngineError",
    "FxcError",
    "GateError",
    "MissingRuntimeError",
    "ModelSpecError",
    "NormalFormError",
    "ParityError",
    "PassError",
    "PruneError",
    "UsageError",
]


class FxcError(Exception):
    """Base class of all errors raised on purpose by fxcompress.

    Args:
        number: Position in the error family, e.g. ``1`` gives ``FXC-CAPTURE-001``.
        what: One sentence: what happened.
        where: The node, layer, file or batch it happened at, with the user's ``file:line`` when known.
        why: The reason.
        fix: What the user can do about it.
    """

    family = "ERROR"
    exit_code = 1

    def __init__(self, number: int, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.id = f"FXC-{self.family}-{number:03d}"
        self.what, self.where, self.why, self.fix = what, where, why, fix
        parts = [f"{self.id} {what}"]
        parts += [f"  {label}: {text}" for label, text in (("where", where), ("why", why), ("fix", fix)) if text]
        super().__init__("\n".join(parts))


class UsageError(FxcError):
    """A wrong argument, option or combination of them."""

    family = "USAGE"
    exit_code = 2


class ModelSpecError(UsageError):
    """A MODEL argument that cannot be resolved to a model."""

    family = "MODEL"


class CaptureError(FxcError):
    """A model that cannot be captured into one graph; lists every obstacle found."""

    family = "CAPTURE"
    exit_code = 3


class NormalFormError(FxcError):
    """A graph that is not in the normal form passes rely on."""

    family = "GRAPH"
    exit_code = 1


class PassError(FxcError):
    """A pass that failed, changed outputs it promised to keep, or was given a model it cannot work on."""

    family = "PASS"
    exit_code = 3


class PruneError(PassError):
    """A pruning request that cannot be planned: a wrong ratio, an unknown layer, a budget out of reach."""

    family = "PRUNE"


class CertificateError(PassError):
    """A pruned program that does not compute what the dense one computes with the same channels masked."""

    family = "CERT"
    exit_code = 4


class CalibrationError(FxcError):
    """Calibration data that is empty, broken, of the wrong shape, or not finite."""

    family = "DATA"
    exit_code = 2


class EngineError(FxcError):
    """An engine that cannot be built or run."""

    family = "ENGINE"
    exit_code = 3


class MissingRuntimeError(EngineError):
    """A runtime that is not installed; ``fix`` holds the pip line."""

    family = "RUNTIME"
    exit_code = 2


class ParityError(EngineError):
    """An engine whose outputs differ from the simulated graph by more than the tolerance."""

    family = "PARITY"
    exit_code = 4


class GateError(FxcError):
    """An accuracy or speed gate that was missed; ``engine`` holds what was built."""

    family = "GATE"
    exit_code = 4

    engine: object = None


class ArtifactError(FxcError):
    """A saved folder that cannot be written, is incomplete, or was changed after it was written."""

    family = "ARTIFACT"
    exit_code = 5
