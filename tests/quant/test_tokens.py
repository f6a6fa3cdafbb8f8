"""Tokens that a vocabulary does not have are named, whichever pass reads them first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import CalibrationError


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


def batches(bad: int) -> list[Tensor]:
    found = [torch.randint(0, 20, (2, 5)) for _ in range(5)]
    found[3][1, 2] = bad
    return found


@pytest.mark.parametrize("bad", [20, -1])
@pytest.mark.parametrize(
    "step",
    [fxc.QuantizeStatic(), fxc.QuantizeWeights(group_size=16, method="gptq"), fxc.SmoothQuant(), fxc.Cast("fp16")],
)
def test_a_token_that_the_vocabulary_lacks(step: fxc.Pass, bad: int) -> None:
    program = fxc.capture(Text().eval(), (batches(0)[0],))
    with pytest.raises(CalibrationError, match=f"calibration batch 3 holds the token {bad}") as caught:
        step(program, fxc.Context(calibration=batches(bad)))
    assert "20 tokens, 0 to 19" in str(caught.value) and "table" in str(caught.value)
    assert "While executing" not in str(caught.value)
    assert not program.gm.get_submodule("table")._forward_pre_hooks


def test_a_model_that_fails_for_another_reason() -> None:
    program = fxc.capture(Text().eval(), (batches(0)[0],))
    with pytest.raises(CalibrationError, match="RuntimeError: as if on the device"):
        fxc.QuantizeStatic()(broken(program), fxc.Context(calibration=batches(0), verify=False))


def broken(program: fxc.Program) -> fxc.Program:
    """A program whose last layer fails on good tokens."""

    def fails(*_: Any) -> None:
        raise RuntimeError("as if on the device")

    copy = program.clone()
    copy.gm.get_submodule("head").register_forward_pre_hook(fails)
    return copy


def test_key_value_scales() -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    data = [{"input_ids": x} for x in batches(20)]
    with pytest.raises(CalibrationError, match="calibration batch 3 holds the token 20") as caught:
        fxc.kv_cache_scales(fxc.capture(model, (), data[0]), data)
    assert "While executing" not in str(caught.value)
