"""QATCallback: freezes norms and ranges at an epoch of `fine_tune`."""

from __future__ import annotations

from typing import Any

from fxcompress.errors import UsageError
from fxcompress.qat.program import QATProgram

__all__ = ["QATCallback"]


class QATCallback:
    """From given epochs on (counted from 0) norms are frozen and observers are off.

    A run that is resumed behind such an epoch is frozen at once.

    Args:
        program: What `fine_tune` trains.
        freeze_bn: Epoch before which `QATProgram.freeze_bn` is called; None: never.
        freeze_ranges: Epoch before which `QATProgram.disable_observers` is called; None: never.

    Raises:
        UsageError: no prepared program, or an epoch is not a whole number of at least 0.
    """

    def __init__(self, program: QATProgram, *, freeze_bn: int | None = None, freeze_ranges: int | None = None) -> None:
        if not isinstance(program, QATProgram):
            fix = "prepare it with fxc.prepare_qat"
            raise UsageError(513, f"a {type(program).__name__} has no norms and ranges to freeze", fix=fix)
        for name, epoch in (("freeze_bn", freeze_bn), ("freeze_ranges", freeze_ranges)):
            if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0):
                raise UsageError(514, f"{name} must be an epoch, counted from 0, not {epoch!r}", fix="give 0 or more")
        self.prepared = program
        self.freeze_bn, self.freeze_ranges = freeze_bn, freeze_ranges

    def begin_epoch(self, number: int) -> None:
        """Called by `fine_tune` before each epoch."""
        if self.freeze_bn is not None and number >= self.freeze_bn:
            self.prepared.freeze_bn()
        if self.freeze_ranges is not None and number >= self.freeze_ranges:
            self.prepared.disable_observers()

    def step(self, optimizer: Any) -> None:
        """Nothing is done between the steps."""
