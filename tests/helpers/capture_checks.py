"""What every captured model must keep, whatever it is made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.capture import capture
from fxcompress.ir import Program

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def images(channels: int = 3, size: int = 64) -> Callable[[int], Inputs]:
    """Batches of random images."""
    return lambda batch: ((torch.randn(batch, channels, size, size),), {})


def floats(*shape: int) -> Callable[[int], Inputs]:
    """Batches of one random tensor [batch, *shape]."""
    return lambda batch: ((torch.randn(batch, *shape),), {})


def assert_same_outputs(expected: Any, got: Any, exact: bool = True) -> None:
    """Same structure, types, shapes and dtypes; values bit for bit, or within 1e-5 of the largest value."""
    a, structure = pytree.tree_flatten(expected)
    b, got_structure = pytree.tree_flatten(got)
    assert type(expected) is type(got)
    assert structure == got_structure
    for want, have in zip(a, b, strict=True):
        if not isinstance(want, Tensor):
            assert want == have and type(want) is type(have)
            continue
        assert want.dtype == have.dtype and want.shape == have.shape
        if exact:
            torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)
        else:
            scale = want.double().abs().max().item() if want.numel() else 0.0
            torch.testing.assert_close(have.double(), want.double(), rtol=0, atol=1e-5 * scale)


def assert_same_state(model: nn.Module, program: Program) -> None:
    """Same keys, and under each key the user's very tensor (so tied weights stay tied)."""
    mine, theirs = program.gm.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert set(mine) == set(theirs)
    for key, tensor in theirs.items():
        assert mine[key] is tensor, f"{key} is another tensor"


def assert_outputs(
    model: nn.Module, program: Program, inputs: Callable[[int], Inputs], batches: Any, exact: bool
) -> None:
    """Model and program agree in eval mode on fresh inputs of each batch size."""
    with torch.no_grad():
        for batch in batches:
            args, kwargs = inputs(batch)
            copies = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
            assert_same_outputs(model(*args, **kwargs), program(*copies[0], **copies[1]), exact)


def check_capture(
    model: nn.Module,
    inputs: Callable[[int], Inputs],
    *,
    example: int = 1,
    batches: tuple[int, ...] = (1, 3),
    exact: bool = True,
    notes: tuple[str, ...] = (),
    again: bool = True,
) -> Program:
    """Capture ``model`` from a training-mode start and assert everything a captured program promises.

    Args:
        model: Any module; left in eval mode.
        inputs: Batch size -> ``(args, kwargs)``.
        example: Batch size of the example.
        batches: Batch sizes the program must run, none of which it has seen but the example's.
        exact: Bit for bit; else 1e-5.
        notes: Parts of the notes that must be there, in order, and no others.
        again: Capture the captured program once more.
    """
    model.train()
    args, kwargs = inputs(example)
    program = capture(model, args, kwargs)
    assert model.training, "the training mode was not restored"
    model.eval()
    assert not program.gm.training
    assert len(notes) == len(program.notes) and all(map(str.__contains__, program.notes, notes)), program.notes
    program.verify()
    assert_outputs(model, program, inputs, batches, exact)
    assert_same_state(model, program)
    if again:
        second = capture(program.gm, args, kwargs)
        assert_outputs(model, second, inputs, batches, exact)
        assert_same_state(model, second)
    return program


def layer_types(program: Program) -> dict[str, str]:
    """Path of every layer -> its class."""
    return {str(node.target): type(module).__name__ for node, module in program.layers()}


def functions(program: Program) -> list[str]:
    """Names of the operators that are no layers, in order."""
    return [str(n.target).split(".")[1] for n in program.graph.nodes if str(n.target).startswith("aten.")]
