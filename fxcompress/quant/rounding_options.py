"""What may be asked of weight rounding, checked once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from fxcompress.errors import UsageError
from fxcompress.quant.spec import QuantSpec

__all__ = ["CALIBRATED", "METHODS", "RangeChoice", "RoundingMethod", "RoundingOptions"]

RoundingMethod = Literal["rtn", "hqq", "gptq", "awq", "awq+gptq"]
RangeChoice = Literal["minmax", "mse", "output"]
METHODS = ("rtn", "hqq", "gptq", "awq", "awq+gptq")
#: Methods that look at the layers' inputs.
CALIBRATED = ("gptq", "awq", "awq+gptq")


@dataclass(frozen=True)
class RoundingOptions:
    """See `fxcompress.QuantizeWeights` for the meaning of each.

    Raises:
        UsageError: a value is unknown or out of range, or two of them exclude each other.
    """

    bits: int = 4
    symmetric: bool = True
    method: str = "rtn"
    calibrator: RangeChoice | None = None
    samples: int = 128
    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    sequential: bool = True
    skip_tokens: int = 0
    checkpoint: str | None = None
    progress: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(480, f"unknown rounding method {self.method!r}", fix=f"use one of {', '.join(METHODS)}")
        if self.calibrator == "output" and not self.calibrated:
            why = "the error of the output is measured with the layers' inputs"
            raise UsageError(
                481, f"calibrator='output' and method={self.method!r}", why=why, fix="use mse, or a calibrated method"
            )
        if self.calibrator is not None and self.method == "hqq":
            what, fix = f"calibrator={self.calibrator!r} and method='hqq'", "leave calibrator out, or use method='rtn'"
            raise UsageError(489, what, why="hqq fits its ranges itself", fix=fix)
        if not 0 < self.damping < 1:
            raise UsageError(482, f"damping={self.damping}: not between 0 and 1", fix="use 0.01")
        for name, least in (("samples", 1), ("skip_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                what = f"{name}={value!r} is not a whole number of {least} or more"
                raise UsageError(483, what, fix=f"pass {name}={least} or more")
        if self.act_order and not self.static_groups:
            raise UsageError(
                484,
                "act_order=True needs static_groups=True",
                why="ranges taken on the way need their group's columns side by side",
                fix="leave static_groups out, or pass act_order=False",
            )

    @property
    def calibrated(self) -> bool:
        """True when the method looks at the layers' inputs."""
        return self.method in CALIBRATED

    @property
    def range_method(self) -> RangeChoice:
        """How the range of a group is found."""
        return self.calibrator or ("output" if self.calibrated else "mse")

    @property
    def scales(self) -> bool:
        """True when channels are scaled before rounding."""
        return self.method.startswith("awq")

    @property
    def compensates(self) -> bool:
        """True when open columns take up rounding errors."""
        return self.method.endswith("gptq")

    def spec(self, group_size: int | None) -> QuantSpec:
        """The grid of rows with groups of ``group_size``; None: whole rows."""
        return QuantSpec(self.bits, signed=self.symmetric, symmetric=self.symmetric, axis=0, group_size=group_size)

    def key(self) -> dict[str, Any]:
        """What the result depends on."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in ("checkpoint", "progress", "in_place")}
