"""What data tells about channels: gradients of a loss, and feature maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from fxcompress.data import CalibrationData, all_finite, as_call
from fxcompress.errors import PruneError
from fxcompress.ir import Program, differentiating, evaluating
from fxcompress.layers import ACTIVATIONS, TransposedLinear

__all__ = ["Loss", "default_loss", "dense", "gradients", "map_sources", "parameter_names", "visit_maps"]

#: ``loss(output, batch)``: a scalar from the program's output and the batch as the loader yielded it.
Loss = Callable[[Any, Any], Tensor]

_aten = torch.ops.aten

_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
)
#: Layer classes and the dimension of their output that holds the channels.
_CHANNEL_DIMS: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.Conv1d, nn.ConvTranspose1d, nn.InstanceNorm1d), -2),
    ((nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d), -3),
    ((nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d), -4),
    ((*_NORMS, nn.PReLU), 1),
    ((nn.Linear, TransposedLinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag), -1),
)
#: Layers that keep channels apart: a feature map is read behind them when nothing else reads it before.
_CHANNELWISE_LAYERS = (*_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm)
_CHANNELWISE_LAYERS += (nn.PReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_CHANNELWISE_FUNCTIONS = frozenset(ACTIVATIONS.values()) | {
    getattr(_aten, name).default
    for name in ("elu", "selu", "celu", "tanh", "mish", "hardsigmoid", "softplus", "log_sigmoid")
}


def parameter_names(program: Program) -> dict[str, nn.Parameter]:
    """Every parameter under every name it has (a tied one has several)."""
    return dict(program.gm.named_parameters(remove_duplicate=False))


class _Recall:
    """Passes batches on and remembers the last one, for what needs its labels too."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source = source
        self.last: Any = None
        self.number = -1

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.source):
            self.number, self.last = number, batch
            yield batch


# ------------------------------------------------------------------------------------------------ gradients
def gradients(
    program: Program, names: Iterable[str], data: Iterable[Any], loss: Loss | None, samples: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the loss, one dict a batch, in eval mode; the program is left as it was.

    Args:
        program: What to differentiate. Parameters that do not require gradients get them too.
        names: Parameters to differentiate for; names of other tensors are passed over.
        data: Iterable of batches (see ``fxcompress.data``).
        loss: ``loss(output, batch)``; None for the cross-entropy with the label behind the inputs.
        samples: No further batch is read once this many samples were seen; None for all of them.

    Returns:
        Name -> gradient in the parameter's shape and dtype; zeros where the loss does not depend on it.

    Raises:
        PruneError: no loss is given and the batches have no label, or the loss is not a finite scalar.
        CalibrationError: batches that do not fit the program.
    """
    known = parameter_names(program)
    chosen = {n: known[n] for n in names if n in known and known[n].is_floating_point()}
    unique = list({id(p): p for p in chosen.values()}.values())
    if not unique:
        return
    source = data if isinstance(data, CalibrationData) else CalibrationData(data)
    recall = _Recall(source.data)
    measure = loss if loss is not None else default_loss(program)
    for args, kwargs in CalibrationData(recall).calls(program, samples):
        with _differentiable(program, unique):
            value = measure(program(*args, **kwargs), recall.last)
            _check_loss(value, recall.number)
            found = torch.autograd.grad(value, unique, allow_unused=True)
        whole = {id(p): torch.zeros_like(p) if g is None else dense(g) for p, g in zip(unique, found, strict=True)}
        yield {name: whole[id(p)].detach() for name, p in chosen.items()}


def dense(gradient: Tensor) -> Tensor:
    """A gradient with all its zeros (those of sparse embeddings leave them out)."""
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


@contextmanager
def _differentiable(program: Program, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Eval mode with gradients for ``parameters``; modes and ``requires_grad`` are restored."""
    flags = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with differentiating(program.gm):
            yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def _check_loss(value: Any, number: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        why = "it does not depend on the parameters" if isinstance(value, Tensor) and value.numel() == 1 else ""
        fix = "return one differentiable number from loss(output, batch)"
        raise PruneError(49, f"the loss must be a differentiable scalar, not {got}", why=why, fix=fix)
    if not all_finite(value):
        fix = "check the data, the labels and the loss"
        raise PruneError(50, "the loss is NaN or infinite", where=f"batch {number}", fix=fix)


def default_loss(program: Program) -> Loss:
    """Cross-entropy of the program's only output with the integer label behind the inputs.

    Output [N, classes, ...] (float), label [N, ...] (integer). Raises PruneError when the batch has no such label.
    """
    names = program.signature.names

    def cross_entropy(output: Any, batch: Any) -> Tensor:
        label = _label(batch, names)
        outputs = [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)]
        if label is None or len(outputs) != 1:
            why = (
                "the batches have no integer label behind the inputs" if label is None else "there are several outputs"
            )
            fix = "pass loss=, a function loss(output, batch) -> scalar, or batches (input, label)"
            raise PruneError(48, "there is no default loss for this model and data", why=why, fix=fix)
        logits = outputs[0]
        try:
            return F.cross_entropy(logits, label.to(logits.device, torch.int64))
        except (RuntimeError, ValueError, IndexError) as error:
            why = f"output {list(logits.shape)}, label {list(label.shape)}: {error}"
            fix = "pass loss=, a function loss(output, batch) -> scalar"
            raise PruneError(54, "the default loss, cross-entropy, does not fit", why=why, fix=fix) from error

    return cross_entropy


def _label(batch: Any, names: tuple[str, ...]) -> Tensor | None:
    """The integer tensor behind the inputs of a batch, or None."""
    if not isinstance(batch, (list, tuple)):
        return None
    args, kwargs = as_call(batch, names)
    inputs = 1 if kwargs or (batch and args and args[0] is not batch[0]) else len(args)
    last = batch[-1] if len(batch) > max(1, inputs) else None
    if not isinstance(last, Tensor) or last.dtype == torch.bool or last.is_floating_point() or last.is_complex():
        return None
    return last


# ------------------------------------------------------------------------------------------------ feature maps
def map_sources(program: Program, names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Where the feature maps of layers are read: name of a node, and the channel dimension of its value.

    That is the layer's own node or, where nothing else reads its value, the norm, dropout and activation behind it:
    published criteria look at what the next layer reads.

    Args:
        program: Holds the layers.
        names: Names of nodes.

    Returns:
        Without the nodes that are no layer with one known channel dimension.
    """
    wanted = set(names)
    found = {}
    for node, module in program.layers():
        value = node.meta.get("val")
        dim = next((dim for kinds, dim in _CHANNEL_DIMS if isinstance(module, kinds)), None)
        if node.name in wanted and dim is not None and isinstance(value, Tensor) and value.dim() > 1:
            found[node.name] = (_behind(program, node).name, dim % value.dim())
    return found


def _behind(program: Program, node: Node) -> Node:
    """The last of the channel-wise nodes that alone read what ``node`` yields."""
    while True:
        readers = [u for u in node.users if u.op == "output" or isinstance(u.meta.get("val"), (Tensor, tuple, list))]
        if len(readers) != 1 or readers[0].all_input_nodes[:1] != [node] or not _channelwise(program, readers[0]):
            return node
        node = readers[0]


def _channelwise(program: Program, node: Node) -> bool:
    if node.op == "call_module":
        return isinstance(program.module(node), _CHANNELWISE_LAYERS)
    return node.op == "call_function" and node.target in _CHANNELWISE_FUNCTIONS


def visit_maps(
    program: Program,
    data: Iterable[Any],
    wanted: Iterable[tuple[str, int]],
    visit: Callable[[tuple[str, int], Tensor], None],
    samples: int | None = None,
) -> None:
    """Run the program on data, in eval mode without gradients, and show the feature maps of some nodes.

    Args:
        program: What to run; left as it was.
        data: Iterable of batches (see ``fxcompress.data``).
        wanted: Pairs of a node name and the dimension that holds the channels.
        visit: Called with the pair and the node's value as [channels, samples, positions ...].
        samples: No further batch is read once this many samples were seen; None for all of them.

    Raises:
        PruneError: a feature map holds NaN or infinity.
        CalibrationError: batches that do not fit the program.
    """
    visitor = _Visitor(program, wanted, visit)
    source = data if isinstance(data, CalibrationData) else CalibrationData(data)
    for args, kwargs in source.calls(program, samples):
        leaves = program.signature.flatten(args, kwargs)
        with torch.no_grad(), evaluating(program.gm):
            visitor.run(*leaves, enable_io_processing=False)


class _Visitor(Interpreter):
    """Runs a graph and shows the values of some nodes."""

    def __init__(
        self, program: Program, wanted: Iterable[tuple[str, int]], visit: Callable[[tuple[str, int], Tensor], None]
    ) -> None:
        super().__init__(program.gm)
        self.visit = visit
        self.dims: dict[str, list[int]] = {}
        for name, dim in sorted(set(wanted)):
            self.dims.setdefault(name, []).append(dim)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        dims = self.dims.get(n.name, [])
        if dims and not all_finite(result):
            what = "a feature map holds NaN or infinity"
            raise PruneError(55, what, where=f"node {n.name}", fix="check the weights and the data")
        for dim in dims:
            maps = result.movedim(dim, 0)
            self.visit((n.name, dim), maps.unsqueeze(1) if dim == 0 else maps)
        return result
