"""Scales of key-value caches against what hooks see in transformers' own models, and the files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.checkpoints.folder import Reader
from fxcompress.errors import ArtifactError, CalibrationError, UsageError
from fxcompress.kv_cache.find import find_attention

transformers = pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)
LAYERS, HEADS, FEATURES = 2, 2, 8


@cache
def llama() -> tuple[nn.Module, fxc.Program, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": HEADS, "use_cache": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    data = [{"input_ids": torch.randint(0, 48, (2, 12))} for _ in range(3)]
    return model, fxc.capture(model, (), data[0]), data


class Seen(transformers.DynamicCache):  # type: ignore[misc, name-defined]
    """A cache that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.written[layer_idx] = (key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@cache
def written() -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer over all data, [sequences, heads, tokens, features], as transformers caches them."""
    model, _, data = llama()
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(LAYERS)]
    for batch in data:
        seen = Seen()
        with torch.no_grad():
            model(**batch, use_cache=True, past_key_values=seen)
        for layer, pair in seen.written.items():
            found[layer].append(pair)
    return [(torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])) for pairs in found]


def naive(x: Tensor, granularity: str) -> Tensor:
    dims = {"tensor": (0, 1, 2, 3), "head": (0, 2, 3), "channel": (0, 2)}[granularity]
    return x.abs().amax(dims)


def test_keys_and_values_are_those_that_a_cache_stores() -> None:
    _, program, data = llama()
    layers = find_attention(program)
    assert [x.name for x in layers] == [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
    assert all(x.rotary for x in layers)
    for granularity in ("tensor", "head", "channel"):
        scales = fxc.kv_cache_scales(program, data, granularity=granularity, rotary=False)
        assert scales.tokens == 3 * 2 * 12
        for (key, value), (k, v) in zip(scales.scales(1.0), written(), strict=True):
            torch.testing.assert_close(key.squeeze(), naive(k, granularity), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(value.squeeze(), naive(v, granularity), rtol=1e-5, atol=1e-6)


def test_ranges_of_rotated_keys_hold_at_every_position() -> None:
    model, program, data = llama()
    scales = fxc.kv_cache_scales(program, data, granularity="channel")
    for layer, (k, _) in zip(scales.layers, written(), strict=True):
        pairs = torch.hypot(k[..., : FEATURES // 2], k[..., FEATURES // 2 :])
        wanted = torch.cat([pairs, pairs], dim=-1).amax((0, 2))
        torch.testing.assert_close(layer.key, wanted, rtol=1e-5, atol=1e-6)
    rotated = {}
    for shift in (0, 30, 1000):  # the same tokens elsewhere
        seen = Seen()
        with torch.no_grad():
            model(**data[0], use_cache=True, past_key_values=seen, position_ids=torch.arange(12)[None] + shift)
        rotated[shift] = seen.written[0][0].abs().amax((0, 2))
        assert bool((rotated[shift] <= scales.layers[0].key * (1 + 1e-5)).all())
    assert not torch.allclose(rotated[0], rotated[1000], rtol=0.05)


@pytest.mark.parametrize("bits", [8, 4, "fp8"])
def test_the_noise_is_that_of_the_format(bits: int | str) -> None:
    _, program, data = llama()
    scales = fxc.kv_cache_scales(program, data, bits=bits, granularity="head", rotary=False)
    for layer, (_, v) in zip(scales.layers, written(), strict=True):
        scale = layer.value[..., None] / {8: 128, 4: 8, "fp8": 448}[bits]
        if bits == "fp8":
            got = (v / scale).to(torch.float8_e4m3fn).float() * scale
        else:
            half = 1 << (int(bits) - 1)
            got = torch.clamp((v / scale).round(), -half, half - 1) * scale
        noise = 10 * torch.log10(v.double().square().sum() / (got - v).double().square().sum())
        assert layer.value_sqnr_db == pytest.approx(float(noise), abs=0.01)
    assert "layers.1.self_attn" in str(scales)


def test_clipping_for_the_least_squared_error_has_less_noise() -> None:
    _, program, data = llama()
    plain = fxc.kv_cache_scales(program, data, bits=4)
    clipped = fxc.kv_cache_scales(program, data, bits=4, method="mse")
    for a, b in zip(plain.layers, clipped.layers, strict=True):
        assert b.key_sqnr_db > a.key_sqnr_db + 0.3 and b.value_sqnr_db > a.value_sqnr_db
        assert float(b.key) < float(a.key)


def test_the_file_of_genai(tmp_path: Path) -> None:
    _, program, data = llama()
    scales = fxc.kv_cache_scales(program, data, granularity="channel", rotary=False)
    content = json.loads(scales.save_genai(tmp_path / "kv.json").read_text())
    assert content["qmax"] == 128 and content["layer_ids"] == [0, 1] and scales.genai_type == "int8_per_channel"
    for name, which in (("k_scales", 0), ("v_scales", 1)):
        found = torch.tensor(content["scales"][name])
        assert found.shape == (LAYERS, HEADS * FEATURES)
        wanted = torch.stack([naive(pair[which], "channel").flatten() / 128 for pair in written()])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    tensor = fxc.kv_cache_scales(program, data, bits="fp8")
    content = json.loads(tensor.save_genai(tmp_path / "kv.json").read_text())
    assert content["qmax"] == 448 and all(isinstance(s, float) for s in content["scales"]["k_scales"])
    with pytest.raises(UsageError, match="no scales per head"):
        fxc.kv_cache_scales(program, data, granularity="head").save_genai(tmp_path / "kv.json")


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_scales_are_added_to_a_checkpoint(granularity: str, tmp_path: Path) -> None:
    model, program, data = llama()
    packed = fxc.QuantizeWeights(bits=8)(program, fxc.Context(verify=False)).program
    fxc.save_compressed_tensors(packed, tmp_path, config=model.config)
    before = {n: Reader(tmp_path).read(n) for n in Reader(tmp_path).names}
    scales = fxc.kv_cache_scales(program, data, bits="fp8", granularity=granularity)
    reader = Reader(scales.save_compressed_tensors(tmp_path))
    added = set(reader.names) - set(before)
    assert added == {f"model.layers.{i}.self_attn.{x}_scale" for i in range(LAYERS) for x in "kv"}
    assert all(torch.equal(reader.read(n), t) for n, t in before.items())
    shape = (1,) if granularity == "tensor" else (HEADS, 1, 1)
    for i, (key, value) in enumerate(scales.scales(448.0)):
        for letter, wanted in (("k", key), ("v", value)):
            found = reader.read(f"model.layers.{i}.self_attn.{letter}_scale")
            assert found.shape == shape and torch.equal(found.flatten(), wanted.flatten())
    config = reader.config["quantization_config"]
    assert config["kv_cache_scheme"]["type"] == "float" and config["kv_cache_scheme"]["num_bits"] == 8
    assert config["kv_cache_scheme"]["strategy"] == {"tensor": "tensor", "head": "attn_head"}[granularity]
    assert config["format"] == "pack-quantized"
    again = fxc.load_compressed_tensors(program, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**data[0]).logits, packed(**data[0]).logits)


def test_scales_are_added_to_a_float_checkpoint_in_parts(tmp_path: Path) -> None:
    model, program, data = llama()
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    reader = Reader(fxc.kv_cache_scales(program, data).save_compressed_tensors(tmp_path))
    assert "model.layers.1.self_attn.v_scale" in reader.names
    assert reader.read("model.layers.1.self_attn.v_scale").shape == (1,)
    assert reader.config["quantization_config"]["config_groups"] == {}
    assert reader.config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8


class Eager(nn.Module):
    """Attention written out: two queries share a head of keys, which are not rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.drop = nn.Linear(16, 8), nn.Linear(16, 8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.5 + torch.ones(5, 5).triu(1) * -1e4
        return torch.matmul(self.drop(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)), v)


def test_attention_that_is_written_out_and_a_model_that_is_captured_here() -> None:
    torch.manual_seed(0)
    model, data = Eager().eval(), [torch.randn(2, 5, 16) for _ in range(2)]
    scales = fxc.kv_cache_scales(model, data, granularity="channel")
    assert [(x.heads, x.features) for x in scales.layers] == [(2, 4)]
    x = torch.cat(data)
    with torch.no_grad():
        for found, layer in ((scales.layers[0].key, model.k), (scales.layers[0].value, model.v)):
            torch.testing.assert_close(found, layer(x).unflatten(-1, (2, 4)).abs().amax((0, 1)))


class Encoder(nn.Module):
    """Attention that keeps no heads apart, and values that are NaN on demand."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q / (x.amax() < 100), is_causal=True)


def test_what_cannot_be_observed(tmp_path: Path) -> None:
    _, program, data = llama()
    for wrong in ({"bits": 3}, {"granularity": "row"}, {"method": "kl"}, {"samples": 0}):
        with pytest.raises(UsageError, match="not known"):
            fxc.kv_cache_scales(program, data, **wrong)  # type: ignore[arg-type]
    plain = fxc.capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    with pytest.raises(UsageError, match="keeps no keys and values"):
        fxc.kv_cache_scales(plain, [torch.randn(2, 4)])
    bad = fxc.capture(Encoder(), (torch.randn(2, 5, 8),))
    assert fxc.kv_cache_scales(bad, [torch.randn(2, 5, 8)]).layers[0].heads == 2
    with pytest.raises(CalibrationError, match=r"NaN or infinity(?s:.*)values of"):
        fxc.kv_cache_scales(bad, [torch.full((2, 5, 8), 200.0)])
    with pytest.raises(UsageError, match="no scales per channel"):
        fxc.kv_cache_scales(program, data, granularity="channel").save_compressed_tensors(tmp_path)
    scales = fxc.kv_cache_scales(program, data)
    with pytest.raises(ArtifactError, match="cannot be read"):
        scales.save_compressed_tensors(tmp_path)
    packed = fxc.QuantizeWeights(bits=8)(program, fxc.Context(verify=False)).program
    fxc.save_compressed_tensors(packed, tmp_path)
    with pytest.raises(ArtifactError, match=r"no module 'layers.0(?s:.*)give prefix="):
        scales.save_compressed_tensors(tmp_path, prefix="model.")
