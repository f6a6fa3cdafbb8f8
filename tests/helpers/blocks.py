"""Building blocks of known networks, small, for the tests of quantization."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torchvision.models.convnext import CNBlock
from torchvision.models.densenet import _DenseBlock
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import SqueezeExcitation

from fxcompress.capture import capture
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass
from fxcompress.passes import (
    EliminateCommonSubexpressions,
    EliminateDeadCode,
    FoldBatchNorm,
    FoldConstants,
    FuseActivations,
    RemoveIdentity,
)
from fxcompress.pipeline import Pipeline
from fxcompress.quant.placement import Placement, layer_name, place
from fxcompress.quant.scheme import QuantScheme

PREPARE: tuple[Pass, ...] = (
    RemoveIdentity(),
    FoldConstants(),
    EliminateCommonSubexpressions(),
    FoldBatchNorm(),
    FuseActivations(),
    EliminateDeadCode(),
)


def conv(inputs: int, outputs: int, size: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class SqueezeExcite(nn.Module):
    """EfficientNet's block without the depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = conv(4, 8), conv(8, 4)
        self.se = SqueezeExcitation(8, 2, activation=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.se(F.silu(self.expand(x)))) + x  # type: ignore[no-any-return]


class Inception(nn.Module):
    """Branches of different kinds that are concatenated, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 4), conv(4, 4), conv(4, 4, 3), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        z = torch.cat([y, F.max_pool2d(x, 3, 1, 1), x], 1)
        return self.head(z)  # type: ignore[no-any-return]


class Bert(nn.Module):
    """A BERT layer: attention from products, post-norm, residuals in float."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.heads(self.query(x)) @ self.heads(self.key(x)).transpose(2, 3) * 0.5
        context = scores.softmax(-1) @ self.heads(self.value(x))
        x = self.norm1(self.dense(context.transpose(1, 2).reshape(x.shape)) + x)
        return self.norm2(self.down(F.gelu(self.up(x))) + x)  # type: ignore[no-any-return]


class Padded(nn.Module):
    """EfficientNet-Lite's padding: in front of the convolution, as an operator of its own."""

    def __init__(self, value: float = 0.0, mode: str = "constant") -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)
        self.value, self.mode = value, mode

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        if self.mode == "constant":
            y = F.pad(y, (0, 1, 0, 1), value=self.value)
        else:
            y = F.pad(y, (1, 1, 1, 1), mode=self.mode)
        return self.second(y)  # type: ignore[no-any-return]


IMAGE, TOKENS = (2, 4, 8, 8), (2, 5, 8)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: nn.Sequential(conv(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), BasicBlock(4, 4)), (2, 3, 8, 8)),
    "mobilenet_v2": (lambda: nn.Sequential(InvertedResidual(4, 4, 1, 2), InvertedResidual(4, 4, 1, 2)), IMAGE),
    "efficientnet": (lambda: nn.Sequential(SqueezeExcite(), conv(4, 4)), IMAGE),
    "densenet": (lambda: _DenseBlock(2, 4, 2, 4, 0.0), IMAGE),
    "inception": (Inception, (2, 3, 8, 8)),
    "convnext": (lambda: nn.Sequential(CNBlock(4, 1.0, 0.0), CNBlock(4, 1.0, 0.0)), IMAGE),
    "vit": (lambda: EncoderBlock(2, 8, 16, 0.0, 0.0), TOKENS),
    "bert": (Bert, TOKENS),
    "padded": (Padded, (2, 3, 8, 8)),
}


def prepared(model: nn.Module, *shape: int, scheme: QuantScheme | None = None, **options: Any) -> Program:
    """Captured, cleaned up, folded and fused as ``scheme`` asks."""
    torch.manual_seed(0)
    program = capture(model.eval(), (torch.randn(shape),), **options)
    return Pipeline(passes=PREPARE)(program, Context(scheme=scheme)).program


#: ONNX Runtime's way: a convolution runs on integers when its own output is quantized too; adds stay apart.
QDQ = QuantScheme(
    joins=("add", "cat", "mul", "avg_pool"),
    quantized_outputs=("conv", "linear"),
    fused_activations=("relu", "hardtanh"),
    fused_residual=False,
    requantize_cat=True,
)
SCHEMES = {"default": QuantScheme(), "qdq": QDQ, "mul": QuantScheme(joins=("add", "cat", "mul"))}


@cache
def prepared_block(name: str, scheme: str) -> Program:
    make, shape = BLOCKS[name]
    return prepared(make(), *shape, scheme=SCHEMES[scheme])


def placed(name: str, scheme: str = "default") -> tuple[Program, Placement]:
    program = prepared_block(name, scheme).clone()
    return program, place(program, SCHEMES[scheme])


def labels(graph: Graph) -> dict[Node, str]:
    """Path of a layer, name of an operator with its occurrence: names that do not depend on how nodes are called."""
    counts: Counter[str] = Counter()
    found = {}
    for node in graph.nodes:
        if node.op == "call_function":
            base = getattr(node.target, "overloadpacket", node.target).__name__
        else:
            base = {"placeholder": "input", "output": "return"}.get(node.op, str(node.target))
        found[node] = base if base not in counts and node.op != "call_function" else f"{base}#{counts[base]}"
        counts[base] += 1
    return found


def values(placement: Placement) -> dict[str, list[str]]:
    """Label of each quantized value -> labels of those that read the quantized one."""
    if not placement.values:
        return {}
    names = labels(next(iter(placement.values)).graph)
    return {names[v]: [names[u] for u in users] for v, users in placement.values.items()}


def shared(placement: Placement) -> list[set[str]]:
    """Values that share a scale with others."""
    names = dict(zip(placement.values, values(placement), strict=True))
    group_of = {group[0]: group for group in placement.groups}
    sets = [[v for leader in leaders for v in group_of[leader]] for leaders in placement.same_scale]
    known = {v for found in sets for v in found}
    sets += [group for group in placement.groups if len(group) > 1 and group[0] not in known]
    return [{names[v] for v in found} for found in sets]


def layers(placement: Placement) -> list[str]:
    return [layer_name(n) for n in placement.layers]
