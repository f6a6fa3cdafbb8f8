"""A trained network behind coarse weights, as the tests of `TuneScales` take it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fxcompress as fxc
from fxcompress.quant.scheme import QuantScheme
from tests.helpers.digits import trained, training

#: Two bits: scales have much to make up for.
WEIGHTS = fxc.QuantizeWeights(bits=2, group_size=16, fit="adjust")


def batches(size: int = 16, count: int = 24) -> list[Tensor]:
    return [b[0] for b in training(size)][:count]


def rounded(kind: Any, *passes: fxc.Pass, scheme: QuantScheme | None = None) -> tuple[fxc.Program, fxc.Context]:
    """A trained network behind ``passes``, and the context with its float program."""
    data = batches()
    plain = fxc.Pipeline((fxc.FoldBatchNorm(), fxc.FuseActivations()))(fxc.capture(trained(kind), (data[0],))).program
    context = fxc.Context(calibration=data, scheme=scheme, reference=plain)
    return fxc.Pipeline(passes)(plain, context).program, context
