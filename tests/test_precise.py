"""Double precision, and what the order of summation changes."""

import copy

import torch
from torch import nn

import fxcompress as fxc
from fxcompress.precise import as_double, summation_error


def deep(layers: int = 10) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), *blocks).eval()


def test_the_double_program_is_the_module_in_double() -> None:
    model, x = deep(), torch.randn(2, 3, 12, 12)
    program = fxc.capture(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(
            as_double(program).gm(x.double()), copy.deepcopy(model).double()(x.double()), rtol=0, atol=0
        )
    assert program.gm(x).dtype == torch.float32, "the program itself stays"


def test_summation_error_is_that_of_two_orders() -> None:
    model, x = deep(), torch.randn(4, 3, 12, 12)
    program = fxc.capture(model, (x,))
    assert 0 < summation_error(program, [((x,), {})]) < 1e-5
    context = fxc.Context(calibration=[x], scheme=fxc.target("onnxruntime").scheme())
    passes = (*fxc.default_passes(quantize=False), fxc.QuantizeStatic(bias_correction=False))
    quantized = fxc.Pipeline(passes=passes)(program, context).program
    inputs = [torch.randn(8, 3, 12, 12) for _ in range(2)]
    found = summation_error(quantized, [((v,), {}) for v in inputs])
    with torch.no_grad():
        wide = torch.cat([as_double(quantized).gm(v.double()) for v in inputs])
        naive = (torch.cat([quantized(v) for v in inputs]).double() - wide).norm() / wide.norm()
    assert abs(found - float(naive)) < 1e-9
    assert found > 1e-4, "some sums lie at a tie, and a step is a step"
