"""Every pruning pattern by name: 32 rows of the documentation's table and as many unpleasant ones more."""

from __future__ import annotations

from tests.prune.cases import Case
from tests.prune.patterns_attention import ATTENTION
from tests.prune.patterns_conv import CONV
from tests.prune.patterns_move import MOVE
from tests.prune.patterns_sequence import SEQUENCE

__all__ = ["PATTERNS", "Case"]

PATTERNS: dict[str, Case] = {**CONV, **MOVE, **ATTENTION, **SEQUENCE}
