"""Sparsity of decoder language models: tied heads, transposed linear layers, gated MLPs, batches by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc

pytestmark = pytest.mark.slow


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, use_cache=False, **ends))


CASES = {"llama": (llama, 14, "mlp.down_proj"), "gpt": (gpt, 8, "mlp.c_proj")}


@pytest.mark.parametrize("name", CASES)
def test_a_language_model_is_sparse_and_comes_back(name: str) -> None:
    make, layers, permuted = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    data = [{"input_ids": torch.randint(0, 64, (2, 12))} for _ in range(6)]
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def logits() -> Tensor:
        found: Tensor = model(**data[0]).logits.detach()
        return found

    dense, errors = logits(), {}
    for method in ("l1", "sparsegpt"):
        masks = fxc.sparsify(model, pattern="2:4", method=method, permute=True, calibration=data)  # type: ignore[arg-type]
        assert len(masks.kept) == layers and masks.sparsity().total == 0.5
        assert sum(f"{permuted}: input channels permuted" in note for note in masks.notes) == 2
        assert any(note.startswith("lm_head left dense: it shares its weight") for note in masks.notes)
        errors[method] = float((logits() - dense).norm())
        masks.restore()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert errors["sparsegpt"] < errors["l1"]
    at_once = fxc.sparsify(model, pattern="2:4", method="wanda", sequential=False, calibration=data)
    assert len(at_once.kept) == layers
