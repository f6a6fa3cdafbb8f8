"""fxcompress: any PyTorch module into a smaller, faster and proven engine.

Public names are loaded when they are first used, so that ``import fxcompress`` and the command line start at once.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxcompress.api import compile, default_passes, load
    from fxcompress.auto.options import AutoSearch
    from fxcompress.capture import capture, from_exported
    from fxcompress.checkpoints.compressed_tensors import save_compressed_tensors
    from fxcompress.checkpoints.load import load_compressed_tensors
    from fxcompress.engines import Engine, Target, target
    from fxcompress.engines.qdq_export import export_onnx
    from fxcompress.errors import FxcError
    from fxcompress.ir import Program
    from fxcompress.kernel_testing import check_kernel
    from fxcompress.kv_cache.scales import KVCacheScales, kv_cache_scales
    from fxcompress.lower import lower
    from fxcompress.ops import KernelOp
    from fxcompress.parity import check_parity, compare
    from fxcompress.passbase import Context, Pass, Refusal, Result
    from fxcompress.passes import (
        AdaRound,
        Cast,
        EliminateCommonSubexpressions,
        EliminateDeadCode,
        EqualizeLayers,
        FoldBatchNorm,
        FoldConstants,
        FuseActivations,
        PruneChannels,
        QuantizeDynamic,
        QuantizeStatic,
        QuantizeWeights,
        RemoveBlocks,
        RemoveIdentity,
        Rotate,
        SmoothQuant,
        Sparsify,
        TuneScales,
    )
    from fxcompress.pipeline import Pipeline
    from fxcompress.prune.block_plan import BlockPlan, plan_block_removal
    from fxcompress.prune.blocks import Block, find_blocks
    from fxcompress.prune.callback import PruningCallback, SparsityCallback
    from fxcompress.prune.certificate import Certificate
    from fxcompress.prune.importance import Importance
    from fxcompress.prune.optimizer import move_optimizer
    from fxcompress.prune.plan import PruningPlan, plan_pruning
    from fxcompress.prune.schedule import (
        AGPSchedule,
        CubicSchedule,
        ExponentialSchedule,
        IterativeSchedule,
        LinearSchedule,
        OneShotSchedule,
        Schedule,
        make_schedule,
    )
    from fxcompress.prune.sensitivity import Sensitivity, analyze_sensitivity
    from fxcompress.prune.storage import load_pruned, save_pruned
    from fxcompress.qat.callback import QATCallback
    from fxcompress.qat.prepare import prepare_qat
    from fxcompress.qat.program import QATProgram
    from fxcompress.quant.scheme import QuantScheme
    from fxcompress.quant.spec import QuantSpec
    from fxcompress.quant_analysis.report import quant_report
    from fxcompress.quant_analysis.result import QuantReport
    from fxcompress.report import Report
    from fxcompress.rewrite import Match, Rule, apply_rules
    from fxcompress.sparse.api import sparsify
    from fxcompress.sparse.masks import SparsityMasks
    from fxcompress.testing import check_pass
    from fxcompress.train import History, fine_tune

__version__ = "0.1.0"

_HOMES = {
    "train": (
        "History",
        "fine_tune",
    ),
    "prune.optimizer": ("move_optimizer",),
    "prune.callback": (
        "PruningCallback",
        "SparsityCallback",
    ),
    "prune.schedule": (
        "AGPSchedule",
        "CubicSchedule",
        "ExponentialSchedule",
        "IterativeSchedule",
        "LinearSchedule",
        "OneShotSchedule",
        "Schedule",
        "make_schedule",
    ),
    "api": ("compile", "default_passes", "load"),
    "auto.options": ("AutoSearch",),
    "capture": ("capture", "from_exported"),
    "checkpoints.compressed_tensors": ("save_compressed_tensors",),
    "checkpoints.load": ("load_compressed_tensors",),
    "kv_cache.scales": ("KVCacheScales", "kv_cache_scales"),
    "engines": ("Engine", "Target", "target"),
    "engines.qdq_export": ("export_onnx",),
    "errors": ("FxcError",),
    "ir": ("Program",),
    "kernel_testing": ("check_kernel",),
    "lower": ("lower",),
    "ops": ("KernelOp",),
    "parity": ("check_parity", "compare"),
    "passbase": ("Context", "Pass", "Refusal", "Result"),
    "passes": (
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
    ),
    "pipeline": ("Pipeline",),
    "prune.block_plan": ("BlockPlan", "plan_block_removal"),
    "prune.blocks": ("Block", "find_blocks"),
    "prune.certificate": ("Certificate",),
    "prune.importance": ("Importance",),
    "prune.plan": ("PruningPlan", "plan_pruning"),
    "prune.sensitivity": ("Sensitivity", "analyze_sensitivity"),
    "prune.storage": ("load_pruned", "save_pruned"),
    "qat.callback": ("QATCallback",),
    "qat.prepare": ("prepare_qat",),
    "qat.program": ("QATProgram",),
    "quant_analysis.report": ("quant_report",),
    "quant_analysis.result": ("QuantReport",),
    "quant.scheme": ("QuantScheme",),
    "quant.spec": ("QuantSpec",),
    "report": ("Report",),
    "rewrite": ("Match", "Rule", "apply_rules"),
    "sparse.api": ("sparsify",),
    "sparse.masks": ("SparsityMasks",),
    "testing": ("check_pass",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AGPSchedule",
    "AdaRound",
    "AutoSearch",
    "Block",
    "BlockPlan",
    "Cast",
    "Certificate",
    "Context",
    "CubicSchedule",
    "EliminateCommonSubexpressions",
    "EliminateDeadCode",
    "Engine",
    "EqualizeLayers",
    "ExponentialSchedule",
    "FoldBatchNorm",
    "FoldConstants",
    "FuseActivations",
    "FxcError",
    "History",
    "Importance",
    "IterativeSchedule",
    "KVCacheScales",
    "KernelOp",
    "LinearSchedule",
    "Match",
    "OneShotSchedule",
    "Pass",
    "Pipeline",
    "Program",
    "PruneChannels",
    "PruningCallback",
    "PruningPlan",
    "QATCallback",
    "QATProgram",
    "QuantReport",
    "QuantScheme",
    "QuantSpec",
    "QuantizeDynamic",
    "QuantizeStatic",
    "QuantizeWeights",
    "Refusal",
    "RemoveBlocks",
    "RemoveIdentity",
    "Report",
    "Result",
    "Rotate",
    "Rule",
    "Schedule",
    "Sensitivity",
    "SmoothQuant",
    "Sparsify",
    "SparsityCallback",
    "SparsityMasks",
    "Target",
    "TuneScales",
    "analyze_sensitivity",
    "apply_rules",
    "capture",
    "check_kernel",
    "check_parity",
    "check_pass",
    "compare",
    "compile",
    "default_passes",
    "export_onnx",
    "find_blocks",
    "fine_tune",
    "from_exported",
    "kv_cache_scales",
    "load",
    "load_compressed_tensors",
    "load_pruned",
    "lower",
    "make_schedule",
    "move_optimizer",
    "plan_block_removal",
    "plan_pruning",
    "prepare_qat",
    "quant_report",
    "save_compressed_tensors",
    "save_pruned",
    "sparsify",
    "target",
]


class _Package(ModuleType):
    """Keeps ``fxcompress.capture`` the function: importing the submodule of that name would put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fxcompress' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fxcompress.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
