"""Residual blocks: found where they are, refused where a bypass is none, removed exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.analysis import count_macs, count_parameters
from fxcompress.errors import CertificateError
from fxcompress.ir import Program
from fxcompress.prune.block_removal import certify_removal, mask_blocks, remove_blocks


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Model(nn.Module):
    """Layers of several kinds and a forward given as a function of the module and the inputs."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.run = forward
        self.stem = nn.Linear(6, 6)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.gate = nn.Parameter(torch.rand(6))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def program_of(forward: Callable[..., Any], *inputs: Tensor) -> Program:
    return fxc.capture(Model(forward).eval(), inputs or (torch.randn(2, 5, 6),))


def two(s: Any, x: Tensor) -> Tensor:
    """Two sequential blocks of their own."""
    x = s.stem(x)
    x = x + s.drop(s.a(F.relu(s.b(s.norm(x)))))
    return s.head(x + s.gate * s.c(x))


def names(program: Program) -> dict[str, str]:
    return {b.name: b.reason for b in fxc.find_blocks(program)}


# ------------------------------------------------------------------------------------------------ what is a block
BLOCKS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "dropout_norm_and_scale": (two, ["b+a", "c"]),
    "post_norm": (lambda s, x: s.head(s.norm(x + s.a(x))), ["a"]),
    "relu_behind": (lambda s, x: s.head(F.relu(s.a(x) + x)), ["a"]),
    "moved_skip": (lambda s, x: s.head(x.flatten(0, 1) + s.a(x).flatten(0, 1)), ["a"]),
    "scaled_skip": (lambda s, x: s.head(0.5 * x + s.a(x)), ["a"]),
    "parallel": (lambda s, x: s.head(x + s.a(x) + s.b(x)), ["a", "b"]),
    "parallel_in_one_branch": (lambda s, x: s.head(x + (s.a(x) + s.b(x))), ["a+b"]),
    "nested": (lambda s, x: s.head(x + s.a((y := s.b(x)) + s.c(y))), ["c", "b+c+a"]),
    "gate_inside": (lambda s, x: s.head(x + s.a(x) * torch.sigmoid(s.b(x))), ["a+b"]),
    "parameter_without_layer": (lambda s, x: s.head(x + torch.tanh(x) * s.gate), ["gate"]),
    "shared_layer": (lambda s, x: s.head((y := x + s.a(x)) + s.a(y)), ["a", "a#2"]),
    "skip_is_an_output_too": (lambda s, x: (y := s.stem(x), s.head(y + s.a(y))), ["a"]),
    # no blocks
    "doubled": (lambda s, x: s.head(x + x), []),
    "polynomial": (lambda s, x: s.head(x + 0.044715 * x**3), []),
    "broadcast": (lambda s, x: s.head(x + s.a(x).mean(-1, keepdim=True)), []),
    "alpha": (lambda s, x: s.head(torch.add(x, s.a(x), alpha=2)), []),
    "unrelated": (lambda s, x, z: s.head(x + s.a(z)), []),
    "constant": (lambda s, x: s.head(s.a(x) + s.gate.expand_as(x)), []),
    "plain": (lambda s, x: s.head(s.a(x)), []),
}


def inputs_of(forward: Callable[..., Any]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 5, 6) for _ in range(forward.__code__.co_argcount - 1))


@pytest.mark.parametrize("case", BLOCKS)
def test_found_and_removed_exactly(case: str) -> None:
    forward, expected = BLOCKS[case]
    program = program_of(forward, *inputs_of(forward))
    before = program.text(), {k: v.clone() for k, v in program.gm.state_dict().items()}
    blocks = fxc.find_blocks(program)
    assert [(b.name, b.reason) for b in blocks] == [(name, "") for name in expected]
    for chosen in [[b] for b in blocks] + [blocks]:
        pruned = remove_blocks(program, chosen)
        pruned.verify()
        assert certify_removal(program, pruned, chosen)[0] == 0
        if len(chosen) == 1:
            assert count_parameters(program) - count_parameters(pruned) == chosen[0].parameters
            assert count_macs(program) - count_macs(pruned) == chosen[0].macs
            left = {n.name for n in pruned.graph.nodes}
            assert not left & {*chosen[0].nodes, chosen[0].output}
    assert program.text() == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in program.gm.state_dict().items())


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "other_input": (lambda s, x, z: s.head(x + s.a(x * z)), "its branch also reads %"),
    "earlier_value": (lambda s, x: s.head((y := s.stem(x)) + s.a(torch.cat((x, y), -1)[..., :6])), "also reads %"),
    "branch_used_elsewhere": (lambda s, x: (s.head(x + (f := s.a(x))), s.head(f)), "%a is also read by %head_1"),
    "inside_of_branch_used": (lambda s, x: (s.head(x + s.a(f := s.b(x))), s.head(f)), "%b is also read by %head_1"),
    "branch_is_an_output": (lambda s, x: (f := s.a(x), s.head(x + f)), "also read by the output"),
    "projection": (lambda s, x: s.head(s.a(s.norm(x)) + s.b(x)), "its skip is not the block's input but a result of b"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str) -> None:
    forward, reason = REFUSED[case]
    program = program_of(forward, *inputs_of(forward))
    (block,) = fxc.find_blocks(program)
    assert reason in block.reason
    with pytest.raises(fxc.FxcError) as caught:
        fxc.plan_block_removal(program, names=block.name)
    assert caught.value.id == "FXC-PRUNE-400" and block.reason in str(caught.value)


def test_masks_and_positions_are_no_second_source() -> None:
    """A boolean mask and embedded positions steer the branch; they are no other stream of data."""

    def forward(s: Any, x: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        keep = mask[:, :, None].to(x.dtype)
        x = x + s.stem.weight[ids]  # unrelated to x: no block
        x = x + s.a(x * keep) * torch.cos(ids.float())[..., None]
        return s.head(x + s.b(x) * keep)  # type: ignore[no-any-return]

    mask, ids = torch.rand(2, 5) > 0.5, torch.arange(5).repeat(2, 1)
    program = program_of(forward, torch.randn(2, 5, 6), mask, ids)
    assert names(program) == {"a": "", "b": ""}
    assert fxc.plan_block_removal(program, names="a").certify(program).error == 0


# ------------------------------------------------------------------------------------------------ what stays
def test_shared_layers_and_tied_weights_stay() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        x = x + s.a(s.b(x))  # a is used outside, b's weight is c's
        return s.head(x + s.c(x))  # type: ignore[no-any-return]

    model = Model(forward).eval()
    model.c.weight = model.b.weight
    program = fxc.capture(model, (torch.randn(2, 6),))
    first, second = fxc.find_blocks(program)
    assert (first.layers, first.parameters) == (("b", "a"), 6)  # b's bias alone
    pruned = remove_blocks(program, [first])
    kept, dense = pruned.gm.state_dict(keep_vars=True), program.gm.state_dict(keep_vars=True)
    assert set(dense) - set(kept) == {"b.weight", "b.bias"}
    assert kept["c.weight"] is dense["b.weight"] and kept["a.weight"] is dense["a.weight"]
    assert {"a.weight", "b.weight"} <= set(remove_blocks(program, [second]).gm.state_dict())
    assert certify_removal(program, remove_blocks(program, [first, second]), [first, second])[0] == 0


def test_a_module_under_two_names_stays_under_both() -> None:
    model = Model(lambda s, x: s.head(s.alias(x + s.a(x)))).eval()
    model.alias = model.a
    program = fxc.capture(model, (torch.randn(2, 6),))
    pruned = remove_blocks(program, fxc.find_blocks(program))
    assert set(pruned.gm.state_dict()) == set(program.gm.state_dict())


def test_everything_of_the_branch_goes() -> None:
    program = program_of(two)
    pruned = remove_blocks(program, fxc.find_blocks(program))
    gone = {n for n, _ in program.gm.named_modules()} - {n for n, _ in pruned.gm.named_modules()}
    assert gone == {"a", "b", "c", "norm", "drop"}
    assert set(pruned.gm.state_dict()) == {"stem.weight", "stem.bias", "head.weight", "head.bias"}
    assert [n.name for n in pruned.graph.nodes][1:] == ["stem", "head", "output"]


def test_unread_tensors_of_other_places_stay() -> None:
    """What the graph never read is not the removal's to drop."""
    model = Model(two).eval()
    model.unused = nn.Linear(2, 2)
    program = fxc.capture(model, (torch.randn(2, 6),))
    assert "unused.weight" in remove_blocks(program, fxc.find_blocks(program)).gm.state_dict()


def test_layout_that_a_view_relies_on() -> None:
    """The sum is contiguous, its skip is not: the view behind must still work, at every batch size."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x).transpose(1, 2)  # [N, 6, 6], not contiguous
        y = s.a(x.contiguous()) + x
        return s.head(y.view(-1, 6))  # type: ignore[no-any-return]

    program = program_of(forward, torch.randn(2, 6, 6))
    assert not program.run_example()[0].isnan().any()
    (block,) = fxc.find_blocks(program)
    pruned = remove_blocks(program, [block])
    assert certify_removal(program, pruned, [block])[0] == 0
    x = torch.randn(3, 6, 6)
    model = Model(lambda s, x: s.head(s.stem(x).transpose(1, 2).reshape(-1, 6)))
    model.load_state_dict(program.gm.state_dict())
    torch.testing.assert_close(pruned(x), model(x), rtol=0, atol=1e-6)


def test_removed_programs_train_and_capture_again() -> None:
    program = program_of(two)
    pruned = remove_blocks(program, fxc.find_blocks(program)[:1])
    pruned.gm.train()
    pruned(torch.randn(4, 5, 6)).square().mean().backward()
    assert {n for n, p in pruned.gm.named_parameters() if p.grad is not None} == set(dict(pruned.gm.named_parameters()))
    again = fxc.capture(pruned.gm.eval(), (torch.randn(2, 5, 6),))
    assert names(again) == {"c": ""} and set(again.gm.state_dict()) == set(pruned.gm.state_dict())


# ------------------------------------------------------------------------------------------------ the certificate
def test_mask_is_the_branch_times_zero() -> None:
    program = program_of(two)
    zeroed = program_of(two)
    zeroed.gm.load_state_dict(program.gm.state_dict())
    with torch.no_grad():
        zeroed.gm.get_parameter("gate").zero_()  # the second block's branch is multiplied by it
    x = torch.randn(3, 5, 6)
    second = fxc.find_blocks(program)[1]
    torch.testing.assert_close(mask_blocks(program, [second])(x), zeroed(x), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_a_wrong_removal_is_caught_and_named(dtype: torch.dtype, tolerance: float) -> None:
    program = fxc.capture(Model(two).to(dtype).eval(), (torch.randn(2, 5, 6, dtype=dtype),))
    first, second = fxc.find_blocks(program)
    plan = fxc.plan_block_removal(program, names="c")
    certificate = plan.certify(program, plan.apply(program))
    assert (certificate.blocks, certificate.error, certificate.tolerance) == (("c",), 0, tolerance)
    wrong = remove_blocks(program, [second])
    (reader,) = [n for n in wrong.graph.nodes if n.target == "head"]
    reader.args = (next(n for n in wrong.graph.nodes if n.target == "stem"),)  # skips the first block too
    wrong.recompile()
    with pytest.raises(CertificateError, match=r"FXC-CERT-020(.|\n)*where: c \(%") as caught:
        plan.certify(program, wrong)
    assert caught.value.exit_code == 4
    nearly = remove_blocks(program, [second])
    nearly.gm.get_submodule("head")._parameters["bias"] = nn.Parameter(
        nearly.gm.get_parameter("head.bias").detach() + 20 * tolerance
    )
    with pytest.raises(CertificateError, match="%head"):
        certify_removal(program, nearly, [second])
    with pytest.raises(CertificateError):
        certify_removal(program, remove_blocks(program, [first]), [second])
