"""The passes: one rewrite of a program each, named for what it does.

Import them from ``fxcompress`` or ``fxcompress.passes``. The bare name ``passes`` is refused: it would make a second
copy of every pass class, which a pipeline or a recipe does not recognise.
"""

if __name__ != "fxcompress.passes":
    raise ImportError(
        f"the passes were imported as {__name__!r}; import them as 'fxcompress.passes' "
        "(a second copy under another name is not the one that pipelines and recipes know)",
        name=__name__,
    )

from fxcompress.passes.adaround import AdaRound
from fxcompress.passes.cast import Cast
from fxcompress.passes.cleanup import EliminateCommonSubexpressions, EliminateDeadCode, RemoveIdentity
from fxcompress.passes.equalize import EqualizeLayers
from fxcompress.passes.fold_batchnorm import FoldBatchNorm
from fxcompress.passes.fold_constants import FoldConstants
from fxcompress.passes.fuse_activations import FuseActivations
from fxcompress.passes.prune_channels import PruneChannels
from fxcompress.passes.quantize_dynamic import QuantizeDynamic
from fxcompress.passes.quantize_static import QuantizeStatic
from fxcompress.passes.quantize_weights import QuantizeWeights
from fxcompress.passes.remove_blocks import RemoveBlocks
from fxcompress.passes.rotate import Rotate
from fxcompress.passes.smooth_quant import SmoothQuant
from fxcompress.passes.sparsify import Sparsify
from fxcompress.passes.tune_scales import TuneScales

__all__ = [
    "AdaRound",
    "Cast",
    "EliminateCommonSubexpressions",
    "EliminateDeadCode",
    "EqualizeLayers",
    "FoldBatchNorm",
    "FoldConstants",
    "FuseActivations",
    "PruneChannels",
    "QuantizeDynamic",
    "QuantizeStatic",
    "QuantizeWeights",
    "RemoveBlocks",
    "RemoveIdentity",
    "Rotate",
    "SmoothQuant",
    "Sparsify",
    "TuneScales",
]
