"""Optimizers with every kind of state that pruning has to cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: Adam(p, 0.01),
    "adamw_amsgrad": lambda p: AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, 0.003, momentum=0.5, centered=True),
}
