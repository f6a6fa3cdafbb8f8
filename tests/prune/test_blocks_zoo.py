"""Residual blocks of known architectures, removed and held to the model whose last branch layer is set to zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxcompress as fxc
from fxcompress.analysis import count_macs, count_parameters
from fxcompress.errors import PruneError

models = pytest.importorskip("torchvision.models", reason="needs torchvision", exc_type=ImportError)
timm = pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
T = pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ENCODER = {**TEXT, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}


def text(batch: int) -> tuple[Any, ...]:
    mask = torch.ones(batch, 8, dtype=torch.long)
    mask[1::2, 6:] = 0
    return (), {"input_ids": torch.randint(3, 99, (batch, 8)), "attention_mask": mask}


def image(batch: int) -> tuple[Any, ...]:
    return (torch.randn(batch, 3, 32, 32),), {}


#: Name -> (model, inputs, {block that can go: layer whose weight and bias make its branch zero}, refused blocks).
ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], dict[str, str], list[str]]] = {
    "resnet18": (
        lambda: models.resnet18(num_classes=5),
        image,
        {n: f"{n}.bn2" for n in ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")},
        ["layer2.0", "layer3.0", "layer4.0"],
    ),
    "resnet50": (
        lambda: models.ResNet(models.resnet.Bottleneck, [2, 2, 1, 2], num_classes=5),
        image,
        {n: f"{n}.bn3" for n in ("layer1.1", "layer2.1", "layer4.1")},
        ["layer1.0", "layer2.0", "layer3.0", "layer4.0"],
    ),
    "mobilenet_v2": (
        lambda: models.mobilenet_v2(width_mult=0.25, num_classes=5),
        image,
        {f"features.{i}.conv": f"features.{i}.conv.{2 if i == 1 else 3}" for i in (1, 3, 5, 6, 8, 9, 10, 12, 13, 15, 16)},
        [],
    ),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5),
        image,
        {f"blocks.{i}.{b}": f"blocks.{i}.{b}.{last}" for i in (0, 1) for b, last in (("attn", "proj"), ("mlp", "fc2"))},
        [],
    ),
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, depths=(2, 1), embed_dim=24, num_heads=(2, 4), num_classes=5
        ),
        lambda batch: ((torch.randn(batch, 3, 64, 64),), {}),
        {
            f"layers.{i}.blocks.{j}.{b}": f"layers.{i}.blocks.{j}.{b}.{last}"
            for i, j in ((0, 0), (0, 1), (1, 0))
            for b, last in (("attn", "proj"), ("mlp", "fc2"))
        },
        [],
    ),
    "bert": (
        lambda: T.BertForSequenceClassification(T.BertConfig(**ENCODER)),
        text,
        {
            f"bert.encoder.layer.{i}.{b}": f"bert.encoder.layer.{i}.{last}"
            for i in (0, 1)
            for b, last in (("attention", "attention.output.dense"), ("intermediate+output", "output.dense"))
        },
        [],
    ),
    "gpt2": (
        lambda: T.GPT2LMHeadModel(
            T.GPT2Config(vocab_size=99, n_layer=2, n_head=4, n_embd=32, n_positions=64, **TOKENS)
        ),
        text,
        {f"transformer.h.{i}.{b}": f"transformer.h.{i}.{b}.c_proj" for i in (0, 1) for b in ("attn", "mlp")},
        [],
    ),
    "llama": (
        lambda: T.LlamaForCausalLM(T.LlamaConfig(**ENCODER, **TOKENS, num_key_value_heads=2)),
        text,
        {
            f"model.layers.{i}.{b}": f"model.layers.{i}.{b}.{last}"
            for i in (0, 1)
            for b, last in (("self_attn", "o_proj"), ("mlp", "down_proj"))
        },
        [],
    ),
    "t5": (
        lambda: T.T5EncoderModel(T.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
        text,
        {
            f"encoder.block.{i}.layer.{b}": f"encoder.block.{i}.layer.{b}.{last}"
            for i in (0, 1)
            for b, last in (("0.SelfAttention", "o"), ("1.DenseReluDense", "wo"))
        },
        [],
    ),
    "bart": (
        lambda: T.BartModel(
            T.BartConfig(
                vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, **TOKENS,
            )
        ),
        lambda batch: ((), {**text(batch)[1], "decoder_input_ids": torch.randint(3, 99, (batch, 5))}),
        {
            f"{side}.layers.0.{b}": f"{side}.layers.0.{last}"
            for side in ("encoder", "decoder")
            for b, last in (("self_attn", "self_attn.out_proj"), ("fc1+fc2", "fc2"))
        },
        ["decoder.layers.0.encoder_attn"],
    ),
}  # fmt: skip


def tensors(output: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)]


def outputs(model: Any, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(*inputs[0], **inputs[1]))


def silenced(model: nn.Module, layers: list[str]) -> nn.Module:
    """The user's model with the last layer of some branches giving zero."""
    quiet = copy.deepcopy(model)
    with torch.no_grad():
        for path in layers:
            for parameter in quiet.get_submodule(path).parameters():
                parameter.zero_()
    return quiet


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_blocks_of(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, last, refused = ZOO[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # nothing is zero by itself
    example = inputs(1)
    program = fxc.capture(model, *example)
    blocks = {b.name: b for b in fxc.find_blocks(program)}
    assert {n for n, b in blocks.items() if not b.reason} == set(last)
    assert [n for n, b in blocks.items() if b.reason] == refused
    names = list(last)
    for chosen in ([names[0]], [names[-1]], names[::2], names[1:]):
        plan = fxc.plan_block_removal(program, names=chosen)
        pruned = plan.apply(program)
        assert plan.certify(program, pruned).error == 0
        assert plan.parameters[1] == count_parameters(pruned) < plan.parameters[0]
        assert plan.macs[1] == count_macs(pruned) == plan.macs[0] - sum(blocks[n].macs for n in chosen)
        kept, dense = pruned.gm.state_dict(keep_vars=True), program.gm.state_dict(keep_vars=True)
        assert all(kept[n] is dense[n] for n in kept)
        reference = silenced(model, [last[n] for n in chosen])
        for batch in (1, 3):
            given = inputs(batch)
            for want, got in zip(outputs(reference, given), outputs(pruned, given), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * max(1.0, want.abs().max().item()))
    if not refused:
        with pytest.raises(PruneError, match="FXC-PRUNE-407"):
            fxc.plan_block_removal(program, names=names)


@pytest.mark.filterwarnings("ignore")
def test_shared_layers_of_albert_stay() -> None:
    """One set of weights, two layers deep: removing one use of them frees no parameter."""
    torch.manual_seed(0)
    program = fxc.capture(T.AlbertModel(T.AlbertConfig(**ENCODER, embedding_size=16)).eval(), *text(2))
    blocks = fxc.find_blocks(program)
    assert [b.name.rpartition(".")[2] for b in blocks] == [
        "attention",
        "ffn+ffn_output",
        "attention#2",
        "ffn+ffn_output#2",
    ]
    assert all(b.parameters == 0 < b.macs for b in blocks)
    plan = fxc.plan_block_removal(program, names=blocks[2].name)
    pruned = plan.apply(program)
    assert plan.certify(program, pruned).error == 0
    assert plan.parameters[0] == plan.parameters[1]
    assert set(pruned.gm.state_dict()) == set(program.gm.state_dict())


@pytest.mark.parametrize("importance", ["cosine", "magnitude", "loss"])
def test_a_silent_block_goes_first(importance: str) -> None:
    torch.manual_seed(0)
    model = silenced(models.resnet18(num_classes=5).eval(), ["layer3.1.bn2"])
    program = fxc.capture(model, *image(2))
    data = [(image(4)[0][0], torch.arange(4))]
    if importance == "loss":
        with torch.no_grad():
            answers = model(data[0][0])

        def distance(output: Tensor, batch: Any) -> Tensor:
            return (output - answers).abs().mean()

        plan = fxc.plan_block_removal(program, count=1, importance=importance, data=data, loss=distance)
    else:
        plan = fxc.plan_block_removal(program, count=1, importance=importance, data=data)
    assert plan.removed == ("layer3.1",)
    assert plan.scores["layer3.1"] == pytest.approx(0, abs=1e-6) and min(plan.scores.values()) > -1e-6
