"""Tuned scales: wrong use, odd outputs, which float program teaches, constants on a grid, 16-bit weights."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PassError, UsageError
from fxcompress.layers import Fused
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.placement import layer_kind
from fxcompress.quant.scale_tuning import divergence
from tests.helpers.digits import Attention, trained
from tests.helpers.tuning import WEIGHTS, batches, rounded


# ------------------------------------------------------------------------------------------------ wrong use
def test_wrong_use() -> None:
    program, context = rounded(Attention, WEIGHTS)
    assert context.reference is not None
    with pytest.raises(PassError, match="needs calibration data"):
        fxc.TuneScales()(program, fxc.Context(reference=context.reference))
    with pytest.raises(PassError, match="finds no rounded weight"):
        fxc.TuneScales()(context.reference, context)
    for reference in (None, program):
        with pytest.raises(PassError, match="needs the float program"):
            fxc.TuneScales()(program, fxc.Context(calibration=context.calibration, reference=reference))
    with pytest.raises(UsageError, match="nothing to train with"):
        fxc.TuneScales(epochs=0)
    with pytest.raises(UsageError, match="not above 0"):
        fxc.TuneScales(learning_rate=1.0)
    with pytest.raises(UsageError, match="not known"):
        fxc.TuneScales(loss=cast(Any, "l1"))


@pytest.mark.parametrize("nested", [False, True])
def test_float_weights_that_were_written_over(nested: bool) -> None:
    torch.manual_seed(0)
    data = batches()
    program = fxc.capture(Attention().eval(), (data[0],))
    first: fxc.Pass = fxc.QuantizeWeights(bits=4, group_size=16, fit="adjust", method="gptq", in_place=True)
    first = fxc.Pipeline((first,)) if nested else first
    with pytest.raises(PassError, match="needs the float program"):
        fxc.Pipeline((first, fxc.TuneScales()))(program, fxc.Context(calibration=data))


def test_an_output_without_gradients() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).argmax(-1)

    data = [torch.randn(2, 16) for _ in range(4)]
    program = fxc.capture(Classes().eval(), (data[0],))
    with pytest.raises(PassError, match="no float output"):
        tuned(program, data)


def tuned(program: fxc.Program, data: list[Tensor], **options: Any) -> Any:
    """The result of tuning behind 2-bit weights."""
    passes = (fxc.QuantizeWeights(bits=2, group_size=16), fxc.TuneScales(**options))
    return fxc.Pipeline(passes)(program, fxc.Context(calibration=data))


class Outputs(nn.Module):
    """A linear layer and a function of what it gives."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.layer(x))


def outputs_of(function: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    data = [torch.randn(64, 16) * torch.linspace(0.1, 3, 16) for _ in range(16)]  # features count unlike
    program = fxc.capture(Outputs(function).eval(), (data[0],))
    return tuned(program, data, samples=1024, epochs=3, learning_rate=1e-2, **options)


def test_outputs_that_are_no_logits() -> None:
    with pytest.raises(PassError, match="no output to train scales by has a gradient"):
        outputs_of(lambda x, y: (x * 2, y))
    with pytest.raises(PassError, match="no output to train scales by has a gradient"):
        outputs_of(lambda x, y: y.argmax(-1).float().unsqueeze(-1).expand(-1, 3))
    for function in (lambda x, y: (y.mean(), y), lambda x, y: y[:, :1]):
        with pytest.raises(PassError, match="holds no logits"):
            outputs_of(function)
        assert outputs_of(function, loss="mse").modified


def test_masked_classes_and_empty_outputs() -> None:
    result = outputs_of(lambda x, y: torch.cat([y, torch.full_like(x[:, :2], -math.inf)], 1))
    step = result.metrics["steps"][-1]
    assert 0 < step.metrics["divergence_after"] < step.metrics["divergence_before"]
    plain = outputs_of(lambda x, y: y).metrics["steps"][-1].metrics
    assert step.metrics["divergence_before"] == pytest.approx(plain["divergence_before"], rel=1e-5)
    empty = outputs_of(lambda x, y: (y, y[:, :0]), loss="mse").metrics["steps"][-1].metrics
    assert 0 < empty["divergence_after"] < empty["divergence_before"]
    torch.testing.assert_close(
        divergence([torch.zeros(2, 3), torch.zeros(2, 0)], [torch.ones(2, 3), torch.zeros(2, 0)], "mse"),
        torch.tensor(1.0),
    )


# ------------------------------------------------------------------------------------------------ which float program
def good(program: fxc.Program) -> bool:
    return not any(isinstance(m, FakeQuantize) for m in program.gm.modules())


def test_a_pipeline_with_it_is_bisected() -> None:
    program, data = fxc.capture(trained(Attention), (batches()[0],)), batches()
    passes = (fxc.FuseActivations(), fxc.Pipeline((WEIGHTS, fxc.TuneScales(epochs=1))))
    assert fxc.Pipeline(passes).bisect(program, good, fxc.Context(calibration=data)) == WEIGHTS


def test_a_reference_that_was_given_is_kept() -> None:
    """Weights that are written over are not those of another copy of the model."""
    data = batches()
    program = fxc.capture(copy.deepcopy(trained(Attention)), (data[0],))
    other = fxc.capture(trained(Attention), (data[0],))
    first = fxc.QuantizeWeights(bits=2, group_size=16, fit="adjust", method="gptq", in_place=True)
    passes = (first, fxc.TuneScales(epochs=2, learning_rate=1e-2))
    result = fxc.Pipeline(passes)(program, fxc.Context(calibration=data, reference=other))
    found = result.metrics["steps"][-1].metrics
    assert 0 < found["divergence_after"] < found["divergence_before"]


def test_the_teacher_is_the_last_float_program() -> None:
    """What pruning in front has lost is not for scales to bring back."""
    data = batches()
    program = fxc.capture(trained(Attention), (data[0],))
    sparse = fxc.Sparsify(sparsity=0.5)
    float_program = fxc.Pipeline((sparse,))(program, fxc.Context(calibration=data)).program
    start = fxc.Pipeline((WEIGHTS,))(float_program, fxc.Context(calibration=data)).program
    step = fxc.TuneScales(epochs=1)
    known = step(start, fxc.Context(calibration=data, reference=float_program)).metrics
    compiled = fxc.compile(
        trained(Attention),
        (data[0],),
        passes=[sparse, WEIGHTS, step],
        target="openvino",
        calibration=data,
        measure=False,
    )
    ways = [(sparse, WEIGHTS, step)]
    ways += [(fxc.Pipeline((sparse, WEIGHTS)), step), (sparse, fxc.Pipeline((WEIGHTS, step))), (fxc.Pipeline(ways[0]),)]
    ways += [(fxc.Pipeline((fxc.Pipeline((sparse,)), WEIGHTS)), fxc.Pipeline((step,)))]
    for way in ways:
        found = fxc.Pipeline(way)(program, fxc.Context(calibration=data)).metrics["steps"][-1].metrics
        found = found["steps"][-1].metrics if "steps" in found else found
        assert found["divergence_before"] == pytest.approx(known["divergence_before"], rel=1e-4), way
    assert compiled.report.steps[-1].metrics["divergence_before"] == pytest.approx(known["divergence_before"], rel=1e-4)


def test_in_inference_mode() -> None:
    program, context = rounded(Attention, WEIGHTS)
    with torch.inference_mode():
        made = [x + 0 for x in batches()]
        result = fxc.TuneScales(epochs=3, learning_rate=1e-2)(
            program, fxc.Context(calibration=made, reference=context.reference)
        )
    assert result.changes


def test_adaround_behind_says_why_it_does_nothing() -> None:
    program, context = rounded(Attention, WEIGHTS, fxc.TuneScales(epochs=2, learning_rate=1e-2))
    result = fxc.AdaRound(iterations=2)(program, context)
    assert not result.changes and all("lie on the grid already" in note for note in result.notes if "keeps" in note)
    assert sum("lie on the grid already" in note for note in result.notes) == len(names(program))


def names(program: fxc.Program) -> list[str]:
    return [str(n.target) for n, m in program.layers() if isinstance(m, Fused) and m.weight_fake_quantize is not None]


# ------------------------------------------------------------------------------------------------ constants on a grid
class Coordinates(nn.Module):
    """Constants that are activations: joined by a concat, added, and as large as what they are joined with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 5, 3)
        self.register_buffer("prior", torch.randn(4, 4, 8, 8))
        self.place = nn.Parameter(torch.randn(1, 4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.first(x), cast(Tensor, self.prior)], 1)
        return self.last(self.second(joined) + self.place).mean((2, 3))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_constants_that_are_activations_stay(runtime: str) -> None:
    torch.manual_seed(0)
    model, data = Coordinates().eval(), [torch.randn(4, 3, 8, 8) for _ in range(16)]
    plain = fxc.capture(model, (data[0],), dynamic_shapes=None)
    context = fxc.Context(calibration=data, reference=plain, scheme=fxc.target(runtime).scheme())
    program = fxc.QuantizeStatic(weight_bits=4, eight_bits=())(plain, context).program
    result = fxc.TuneScales(epochs=2, learning_rate=1e-2)(program, context)
    assert result.metrics["weights"] == sum(layer_kind(program, n) is not None for n in program.graph.nodes)
    before, after = program.gm.state_dict(), result.program.gm.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(k.endswith(("weight", "weight_fake_quantize.scale")) for k in moved)
    assert divergence_of(result.program, plain, data) < divergence_of(program, plain, data)


def divergence_of(program: fxc.Program, plain: fxc.Program, data: list[Tensor]) -> float:
    with torch.no_grad():
        return float(torch.stack([divergence([program(x)], [plain(x)], "kl") for x in data]).mean())


def test_a_weight_that_is_a_buffer() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randn(16, 16) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, cast(Tensor, self.w))

    torch.manual_seed(0)
    data = [torch.randn(64, 16) * torch.linspace(0.1, 3, 16) for _ in range(16)]
    program = fxc.capture(Free().eval(), (data[0],))
    result = tuned(program, data, samples=1024, learning_rate=1e-2)
    gm = result.program.gm
    assert "w.weight" in dict(gm.named_buffers()) and not list(gm.named_parameters())
    quantizer = next(m for m in gm.modules() if isinstance(m, FakeQuantize))
    torch.testing.assert_close(
        quantizer(dict(gm.named_buffers())["w.weight"]), dict(gm.named_buffers())["w.weight"], rtol=1e-6, atol=1e-7
    )
    assert not torch.equal(dict(gm.named_buffers())["w.weight"], dict(program.gm.named_buffers())["w.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_judged_is_what_is_put(dtype: torch.dtype) -> None:
    """Small steps, which a 16-bit scale does not follow: the divergence told is that of the program handed over."""
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype).eval()
    )
    data = [torch.randn(32, 64, dtype=dtype) for _ in range(3)]
    plain = fxc.capture(model, (data[0],))
    context = fxc.Context(calibration=data, reference=plain)
    program = fxc.QuantizeWeights(bits=4, group_size=16)(plain, context).program
    result = fxc.TuneScales(epochs=4)(program, context)
    assert result.metrics["divergence_before"] == pytest.approx(divergence_of(program, plain, data), rel=2e-2)
    assert result.metrics["divergence_after"] == pytest.approx(divergence_of(result.program, plain, data), rel=2e-2)


def test_gradients_that_float16_cannot_hold() -> None:
    """Many tokens of many classes: every gradient of a logit is below the smallest float16 number."""

    def gain(dtype: torch.dtype) -> float:
        torch.manual_seed(0)
        model = (
            nn.Sequential(nn.Embedding(4000, 32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4000)).to(dtype).eval()
        )
        data = [torch.randint(0, 4000, (4, 128)) for _ in range(8)]
        plain = fxc.capture(model, (data[0],))
        context = fxc.Context(calibration=data, reference=plain)
        program = fxc.QuantizeWeights(bits=3, group_size=16)(plain, context).program
        found = fxc.TuneScales(epochs=2, learning_rate=2e-2, samples=32)(program, context).metrics
        return 1 - found["divergence_after"] / found["divergence_before"]

    assert gain(torch.float16) > 0.8 * gain(torch.float32) > 0
