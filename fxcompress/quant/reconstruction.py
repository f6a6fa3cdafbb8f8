"""Learned rounding of a quantized program, layer by layer: each sees the inputs that the rounded layers before it make.

Two programs walk side by side: the one that is quantized, and the same without its quantizers, which says what every layer
should give. So a layer also makes up for what those before it have lost ("asymmetric reconstruction", eq. 25 of Nagel et
al. 2020, without the activation function).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.data import Call, all_finite
from fxcompress.ir import Program, evaluating
from fxcompress.layers import Fused
from fxcompress.layerwise.walk import Walk
from fxcompress.progress import progress_bar
from fxcompress.quant.adaround import Annealing, RowsOnGrid, learn_rounding
from fxcompress.quant.bias import with_shift, without_shift
from fxcompress.quant.fake_quantize import QUANTIZERS, FakeQuantize
from fxcompress.sparse.layers import from_rows, to_rows

__all__ = ["BUDGET", "LayerReconstruction", "PairMoments", "Rounding", "float_twin"]

#: Bytes that the calls of a walk may keep.
BUDGET = 1 << 30
#: Input rows that a layer is learned from: a multiple of its features, between these.
_ROWS = (16384, 131072)
_PER_FEATURE = 128
#: With fewer rows a layer's second moments are not known well enough to follow them closely: those of one image are alike.
_ROWS_PER_FEATURE = 100
#: Values of all rows of a layer that are held at once.
_HELD = 1 << 26


def float_twin(program: Program) -> Program:
    """The program without its quantizers, with the biases as they were before they were corrected.

    Nodes keep their names. Weights are those the layers hold, so take the twin before they are rounded for good.
    """
    twin = program.clone()
    for node, module in list(twin.layers()):
        if isinstance(module, QUANTIZERS):
            node.replace_all_uses_with(cast(Node, node.args[0]))
            twin.graph.erase_node(node)
        elif isinstance(module, Fused) and module.weight_fake_quantize is not None:
            module._parameters["bias"] = cast(nn.Parameter | None, without_shift(cast(Any, module).bias))
            module.weight_fake_quantize = None
    twin.recompile()
    return twin


class PairMoments:
    """Sums over the input rows of a float layer, ``x``, and of its quantized twin, ``y``, in float64.

    Args:
        layer: A convolution or linear layer.
        calls: Number of calls that will come.
        seed: Rows are sampled where there are more than needed, the same from both.
    """

    def __init__(self, layer: nn.Module, calls: int, seed: int) -> None:
        self.layer, self.seed = layer, seed
        groups, _, features = to_rows(layer, cast(Tensor, layer.weight)).shape
        wanted = min(max(_PER_FEATURE * features, _ROWS[0]), _ROWS[1], max(1, _HELD // (groups * features)))
        self.rows_per_call = max(1, wanted // max(1, calls))
        shape = (groups, features, features)
        self.second, self.cross = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self.sum_x, self.sum_y = (torch.zeros(shape[:2], dtype=torch.float64) for _ in range(2))
        self.count = self.skipped = 0
        self._x: dict[int, Tensor] = {}

    def see_float(self, number: int, x: Tensor) -> None:
        """The float layer's input in call ``number``."""
        if all_finite(x):
            self._x[number] = self._sampled(number, x)

    def see_quantized(self, number: int, y: Tensor) -> None:
        """The quantized layer's input in the same call; its float twin came before."""
        x = self._x.pop(number, None)
        if x is None or not all_finite(y):
            self.skipped += 1
            return
        rows = self._sampled(number, y)
        self.second += torch.bmm(rows.mT, rows).double()
        self.cross += torch.bmm(x.mT, rows).double()
        self.sum_x += x.sum(1, dtype=torch.float64)
        self.sum_y += rows.sum(1, dtype=torch.float64)
        self.count += rows.shape[1]

    def _sampled(self, number: int, x: Tensor) -> Tensor:
        """Some rows [groups, n, features] of an input, the same for every input of one shape and number."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return sampled_rows(self.layer, x.detach(), self.rows_per_call, generator).float()

    def centred(self, damping: float, about_means: bool) -> tuple[Tensor, Tensor]:
        """``E[y y^T]`` and ``E[x y^T]`` with the mean diagonal of the former times ``damping`` on both diagonals.

        Args:
            damping: Keeps few samples from being learned by heart: as much noise on both inputs. It grows in proportion
                where there are fewer than 100 rows for each feature.
            about_means: About the means, because a bias takes those up.
        """
        n = max(1, self.count)
        second, cross = self.second / n, self.cross / n
        if about_means:
            mean_x, mean_y = self.sum_x / n, self.sum_y / n
            second = second - mean_y.unsqueeze(2) * mean_y.unsqueeze(1)
            cross = cross - mean_x.unsqueeze(2) * mean_y.unsqueeze(1)
        damping *= max(1.0, _ROWS_PER_FEATURE * second.shape[1] / n)
        noise = damping * second.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-12)
        eye = noise * torch.eye(second.shape[1], dtype=torch.float64)
        return second + eye, cross + eye


def sampled_rows(layer: Any, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most ``count`` of the rows of `fxcompress.layerwise.statistics.input_rows`, as [groups, n, features].

    Of a convolution's input only the windows that are taken are copied.
    """
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        flat = x.reshape(-1, x.shape[-1])
        return flat[_choice(len(flat), count, generator).to(x.device)].unsqueeze(0)
    x = x if x.dim() == layer.weight.dim() else x.unsqueeze(0)
    padding = cast(Any, layer)._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(x, padding, mode=mode) if any(padding) else x
    spatial = len(layer.kernel_size)
    for axis in range(spatial):
        size, gap = int(layer.kernel_size[axis]), int(layer.dilation[axis])
        windows = windows.unfold(2 + axis, (size - 1) * gap + 1, int(layer.stride[axis]))[..., ::gap]
    places = (windows.shape[0], *windows.shape[2 : 2 + spatial])
    chosen = _choice(math.prod(places), count, generator).to(x.device)
    at = torch.unravel_index(chosen, places)
    index: Any = (at[0], slice(None), *at[1:])
    picked = windows[index]  # [n, channels, *taps]
    grouped = cast(Tensor, picked.flatten(2).unflatten(1, (layer.groups, -1)))
    return grouped.permute(1, 0, 3, 2).flatten(2)


def _choice(total: int, count: int, generator: torch.Generator) -> Tensor:
    if total <= count:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:count].sort().values


@dataclass(frozen=True)
class Rounding:
    """How layers are rounded.

    Attributes:
        how: The schedule of a layer.
        damping: See `PairMoments.centred`.
        correct_bias: Let existing biases take up the mean error of the output.
        seed: Of what is sampled.
        progress: Show a progress bar.
        blocks: The schedule of a block; None: layers alone.
    """

    how: Annealing
    damping: float
    correct_bias: bool
    seed: int
    progress: bool
    blocks: Annealing | None = None


@dataclass
class LayerReconstruction:
    """Learns the rounding of ``nodes`` of ``program`` in execution order.

    Attributes:
        program: Changed in place; its tensors are replaced, never written into.
        nodes: Fused layers with a frozen weight quantizer, each called once.
        calls: Calibration calls.
        options: How.
        notes: A line for each layer left alone.
    """

    program: Program
    nodes: Sequence[Node]
    calls: Sequence[Call]
    options: Rounding
    notes: list[str] = field(default_factory=list)

    def run(self, twin: Program) -> int:
        """Round every layer; ``twin`` is the program's `float_twin`. Returns how many blocks came out better."""
        names = {node.name: node for node in twin.graph.nodes}
        header = f"adaround: {len(self.nodes)} layers, {len(self.calls)} calibration batches"
        with (
            torch.no_grad(),
            evaluating(self.program.gm),
            evaluating(twin.gm),
            progress_bar("rounded", len(self.nodes), self.options.progress, header) as advance,
        ):
            exact, rounded = Walk(twin, self.calls, BUDGET), Walk(self.program, self.calls, BUDGET)
            return self._run(twin, names, exact, rounded, advance)

    def _run(
        self, twin: Program, names: dict[str, Node], exact: Walk, rounded: Walk, advance: Callable[[], None]
    ) -> int:
        for node in self.nodes:
            moments = self.observe_float(twin, names[node.name], exact)
            value = cast(Node, node.args[0])
            rounded.visit(node, [value], lambda i, v, m=moments: m.see_quantized(i, v[0]))  # type: ignore[misc]
            self.round(node, twin.module(names[node.name]), moments)
            advance()
        return 0

    def observe_float(self, twin: Program, own: Node, exact: Walk) -> PairMoments:
        """What the float layer reads."""
        moments = PairMoments(twin.module(own), len(self.calls), self.options.seed)
        exact.visit(own, [cast(Node, own.args[0])], lambda i, v: moments.see_float(i, v[0]))
        return moments

    def round(self, node: Node, exact: Any, moments: PairMoments) -> None:
        """Put the learned weight and bias of a layer."""
        if not moments.count:
            self.notes.append(f"{node.target} keeps its rounding: its inputs were never finite")
            return
        layer = cast(Any, self.program.module(node))
        with_bias = self.options.correct_bias and layer.bias is not None
        grid = RowsOnGrid.of(layer.weight.detach(), cast(FakeQuantize, layer.weight_fake_quantize))
        rows = grid.mapped(lambda t: to_rows(layer, t).contiguous())
        second, cross = moments.centred(self.options.damping, with_bias)
        true_rows = to_rows(layer, exact.weight.detach()).double()
        features = rows.low.shape[2]
        if moments.count < features:
            self.notes.append(f"{node.target} keeps its rounding: {moments.count} inputs for {features} features")
            up = rows.nearest()
        else:
            up = learn_rounding(rows, second, torch.bmm(true_rows, cross), self.options.how)
        put_rounded(layer, rows.values(up))
        if with_bias:
            means = (moments.sum_x / moments.count, moments.sum_y / moments.count)
            put_bias(layer, exact, true_rows, rows.values(up).double(), means)


def put_rounded(layer: Any, rows: Tensor) -> None:
    """Give a layer the weight ``rows`` [groups, rows, features], which its quantizer keeps as it is."""
    old = layer.weight
    layer._parameters["weight"] = nn.Parameter(from_rows(layer, rows).to(old.dtype), requires_grad=old.requires_grad)


def put_bias(layer: Any, exact: Any, true_rows: Tensor, rows: Tensor, means: tuple[Tensor, Tensor]) -> None:
    """The bias that gives the quantized layer the mean output of the exact one, remembering the difference."""
    want = torch.bmm(true_rows, means[0].unsqueeze(2)) - torch.bmm(rows, means[1].unsqueeze(2))
    shift = want.flatten()
    old, start = layer.bias, exact.bias
    new = shift if start is None else start.detach().double() + shift
    if all_finite(new):
        bias = nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad)
        layer._parameters["bias"] = with_shift(bias, shift)
