"""What may be asked of `sparsify` and of the pass `Sparsify`, checked once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fxcompress.errors import PruneError
from fxcompress.sparse.pattern import Pattern, parse_pattern
from fxcompress.sparse.solvers import METHODS

__all__ = ["Settings", "as_globs"]


def as_globs(globs: Any) -> tuple[str, ...]:
    """One glob or several, as a tuple."""
    return (globs,) if isinstance(globs, str) else tuple(globs)


@dataclass(frozen=True)
class Settings:
    """See `fxcompress.sparsify` for the meaning of each.

    Raises:
        PruneError: a value is unknown or out of range, or two of them exclude each other.
    """

    sparsity: float | None = None
    pattern: Any = None
    method: str = "l1"
    scope: str = "layer"
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    permute: bool = False
    samples: int = 128
    sequential: bool = True
    block: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        pattern = parse_pattern(self.pattern)
        object.__setattr__(self, "pattern", pattern)
        for name in ("include", "ignore"):
            object.__setattr__(self, name, as_globs(getattr(self, name)))
        if self.method not in METHODS:
            raise PruneError(220, f"unknown method {self.method!r}", fix=f"use one of {', '.join(METHODS)}")
        if self.scope not in ("layer", "global"):
            raise PruneError(221, f"unknown scope {self.scope!r}", fix="use 'layer' or 'global'")
        self._check_amount(pattern)
        self._check_choices(pattern)

    def _check_amount(self, pattern: Pattern | None) -> None:
        if pattern is None and self.sparsity is None:
            raise PruneError(222, "no amount of sparsity is given", fix="pass sparsity=0.5 or pattern='2:4'")
        if self.sparsity is None:
            return
        if isinstance(self.sparsity, bool) or not 0 <= self.sparsity < 1:
            raise PruneError(
                223, f"sparsity={self.sparsity!r} is not from 0 to below 1", fix="0.5 prunes half the weights"
            )
        if pattern is not None and abs(pattern.sparsity - self.sparsity) > 1e-9:
            what = f"pattern {pattern} prunes {pattern.sparsity:.4g} of the weights, sparsity={self.sparsity} was asked"
            raise PruneError(224, what, fix="leave sparsity out")

    def _check_choices(self, pattern: Pattern | None) -> None:
        clash = ""
        if self.scope == "global" and (pattern is not None or self.calibrated):
            clash = f"scope='global' and {'an N:M pattern' if pattern else self.method}: it has its share in every row"
            if self.method == "sparsegpt" and not pattern:
                clash = "scope='global' and sparsegpt: it has its share in every block of columns"
        elif self.block != 1 and (pattern is not None or self.method == "sparsegpt"):
            clash = f"block={self.block} and {'an N:M pattern' if pattern else 'sparsegpt'}"
        elif self.permute and pattern is None:
            clash = "permute without an N:M pattern: the order of the channels changes nothing"
        if clash:
            raise PruneError(225, f"these options exclude each other: {clash}", fix="leave one of them out")
        for name in ("samples", "block"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PruneError(
                    226, f"{name}={value!r} is not a whole number of 1 or more", fix=f"pass {name}=1 or more"
                )

    @property
    def calibrated(self) -> bool:
        """True when the method looks at the layers' inputs."""
        return METHODS[self.method]

    @property
    def target(self) -> float | Pattern:
        """What to prune: a pattern, or a share."""
        return self.pattern if isinstance(self.pattern, Pattern) else float(self.sparsity or 0)

    def record(self) -> dict[str, Any]:
        """The fields in JSON's own types."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["pattern"] = None if self.pattern is None else str(self.pattern)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
