"""The portable model: the fallback, clear errors, and the same model without its fake-quantizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.engines import target
from fxcompress.errors import EngineError, UsageError
from fxcompress.lowering import lower, strip
from tests.helpers.quick import cnn, images, plain, quantized

pytestmark = pytest.mark.onnxruntime


class Odd(nn.Module):
    """A layer and one operator the table does not have."""

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.fc, self.known = nn.Linear(4, 4), known

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return torch.atan2(y, x) if self.known else torch.hypot(y, x)


def test_what_the_table_does_not_have_goes_through_the_exporter() -> None:
    model = Odd(known=True).eval()
    portable = lower(capture(model, (torch.randn(2, 4),)))
    (note,) = portable.notes
    assert "exporter" in note and "atan2" in note and "test_portable.py" in note
    engine = target("onnxruntime").build(portable, threads=1)
    assert note in engine.notes
    x = torch.randn(5, 4)
    torch.testing.assert_close(engine(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_what_nobody_has_is_a_clear_error() -> None:
    program = capture(Odd(known=False).eval(), (torch.randn(2, 4),))
    with pytest.raises(EngineError, match=r"cannot be written as ONNX(.|\n)*hypot(.|\n)*test_portable\.py") as caught:
        lower(program)
    assert "target='torch'" in caught.value.fix
    assert target("torch").build(program)(torch.randn(3, 4)).shape == (3, 4), "the fix works"


def test_strip_gives_the_float_twin() -> None:
    portable = lower(quantized("onnxruntime"))
    names = portable.fake_quantizers()
    assert "stem.weight_fake_quantize" in names and len(set(names)) == len(names)
    twin = strip(portable)
    assert twin.fake_quantizers() == [] and portable.fake_quantizers() == names, "the original is untouched"
    x = images(3)
    with torch.no_grad():
        expected = cnn()(x)
    rounded = target("onnxruntime").build(twin, threads=1)(x)
    assert float((rounded - expected).norm() / expected.norm()) < 0.01, "only biases may have been rounded"
    restored = strip(portable, state=plain().gm.state_dict())
    torch.testing.assert_close(target("onnxruntime").build(restored, threads=1)(x), expected, rtol=1e-4, atol=1e-5)
    kept = [n for n in names if n.startswith("stem")]
    assert strip(portable, keep=kept).fake_quantizers() == kept


def test_strip_with_other_weights() -> None:
    portable = lower(quantized("onnxruntime"))
    zero = {"head.weight": torch.zeros(10, 16), "head.bias": torch.arange(10.0), "nobody": torch.zeros(1)}
    engine = target("onnxruntime").build(strip(portable, state=zero), threads=1)
    assert torch.equal(engine(images(2)), torch.arange(10.0).expand(2, 10))
    with pytest.raises(UsageError, match=r"given for head\.weight does not fit"):
        strip(portable, state={"head.weight": torch.zeros(10, 17)})
