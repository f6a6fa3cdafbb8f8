"""Checkpoints of compressed-tensors: what is in them, read by the kernels' importer, the package itself, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.checkpoints.folder import Reader
from fxcompress.errors import ArtifactError, UsageError
from fxcompress.kernels.imports import from_compressed_tensors, from_int_quantized

pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)

CASES: dict[str, list[Any]] = {
    "w4": [fxc.QuantizeWeights(bits=4, group_size=32)],
    "w4 asymmetric": [fxc.QuantizeWeights(bits=4, group_size=32, symmetric=False)],
    "w3 whole rows": [fxc.QuantizeWeights(bits=3, group_size=-1)],
    "gptq": [fxc.Rotate(), fxc.QuantizeWeights(bits=4, group_size=32, method="gptq")],
    "w8": [fxc.QuantizeWeights(bits=8)],
    "w8, head too": [fxc.QuantizeWeights(bits=8, include="*")],
    "w8a8 dynamic": [fxc.QuantizeDynamic(ignore="lm_head")],
    "w8a8 static": [fxc.SmoothQuant(), fxc.QuantizeStatic(ignore=("lm_head",), bias_correction=False)],
}


@cache
def llama() -> tuple[nn.Module, fxc.Program, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    batch = {"input_ids": torch.randint(0, 48, (2, 12))}
    return model, fxc.capture(model, (), batch), batch


def quantized(passes: list[Any]) -> fxc.Program:
    _, program, batch = llama()
    for pass_ in passes:
        program = pass_(program, fxc.Context(calibration=[batch], verify=False)).program
    return program


def logits(program: fxc.Program) -> Tensor:
    with torch.no_grad():
        found: Tensor = program(**llama()[2]).logits
        return found


def saved(program: fxc.Program, folder: Path, **options: Any) -> Reader:
    return Reader(fxc.save_compressed_tensors(program, folder, **{"config": llama()[0].config, **options}))


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_comes_back_to_the_last_bit(name: str, tmp_path: Path) -> None:
    program = quantized(CASES[name])
    reader = saved(program, tmp_path)
    again = fxc.load_compressed_tensors(llama()[1], tmp_path)
    assert torch.equal(logits(again), logits(program))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = reader.config["quantization_config"]
    own_head = name in ("w8, head too", "gptq")  # the rotation gives the head a weight of its own
    assert reader.config["tie_word_embeddings"] is not own_head
    assert ("lm_head" in config["ignore"]) is (name not in ("w8, head too", "gptq"))
    assert config["quant_method"] == "compressed-tensors" and reader.config["model_type"] == "llama"
    assert reader.config["dtype"] == "float32"


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_importer_reads_the_weights_of_the_simulation(name: str, tmp_path: Path) -> None:
    program = quantized(CASES[name])
    reader = saved(program, tmp_path)
    group = reader.config["quantization_config"]["config_groups"]["group_0"]
    count = 0
    for path, parts in reader.modules():
        if "weight_scale" not in parts:
            continue
        read = {leaf: reader.read(full) for leaf, full in parts.items()}
        if "weight_packed" in read:
            zero = read.get("weight_zero_point")
            shape, bits = read["weight_shape"], group["weights"]["num_bits"]
            packed = from_compressed_tensors(read["weight_packed"], read["weight_scale"], shape, zero, bits=bits)
        else:
            packed = from_int_quantized(read["weight"], read["weight_scale"])
        steps = (
            packed.integers().unflatten(1, (packed.scales.shape[0], -1)).int() - packed.zero_points().T[..., None].int()
        )
        layer = program.gm.get_submodule(path)
        simulated = layer.weight_fake_quantize(layer.weight)  # type: ignore[operator]
        assert torch.equal((steps * packed.scales.T[..., None]).flatten(1), simulated)
        count += 1
    assert count == (8 if name in ("w8, head too", "gptq") else 7)
    assert group["format"] == ("int-quantized" if "w8a8" in name else "pack-quantized")
    assert group["weights"]["symmetric"] is (name != "w4 asymmetric")
    inputs = group["input_activations"]
    kinds = {"w8a8 dynamic": ("token", True), "w8a8 static": ("tensor", False)}
    assert (None if inputs is None else (inputs["strategy"], inputs["dynamic"])) == kinds.get(name)


def test_the_package_decompresses_the_weights_of_the_simulation(tmp_path: Path) -> None:
    package = pytest.importorskip("compressed_tensors", reason="needs the compressed-tensors package")
    from compressed_tensors.quantization import QuantizationConfig

    for name, passes in CASES.items():
        program = quantized(passes)
        reader = saved(program, tmp_path / name)
        scheme = QuantizationConfig(**reader.config["quantization_config"]).config_groups["group_0"]
        kind = package.compressors.BaseCompressor.get_value_from_registry(scheme.format)
        path = "model.layers.0.mlp.up_proj"
        read = {leaf: reader.read(full) for p, parts in reader.modules() if p == path for leaf, full in parts.items()}
        layer = program.gm.get_submodule(path)
        simulated = layer.weight_fake_quantize(layer.weight)  # type: ignore[operator]
        assert torch.equal(kind.decompress(read, scheme)["weight"], simulated), name


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_it_and_computes_the_same(name: str, tmp_path: Path) -> None:
    """Through ``from_pretrained``; activations of 8 bits get scales of ``max|x| / 127.5`` there, of ``/ 127`` here."""
    pytest.importorskip("compressed_tensors", reason="needs the compressed-tensors package")
    from transformers import AutoModelForCausalLM

    program = quantized(CASES[name])
    # compressed-tensors 0.19 makes room for unpacked zero points there and then finds packed ones, its own as well.
    saved(program, tmp_path, **({"format": "naive-quantized"} if "asymmetric" in name else {}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        got = model(**llama()[2]).logits
    expected, plain = logits(program), logits(llama()[1])
    off = float((got - expected).norm() / expected.norm())
    rounded = float((expected - plain).norm() / plain.norm())
    assert off < (1.5 * rounded if "w8a8" in name else 1e-5), (off, rounded)


def test_transformers_cannot_load_packed_zero_points(tmp_path: Path) -> None:
    """The day it can, the advice in docs/quantization.md goes."""
    pytest.importorskip("compressed_tensors", reason="needs the compressed-tensors package")
    from transformers import AutoModelForCausalLM

    saved(quantized(CASES["w4 asymmetric"]), tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_unpacked_weights_and_two_kinds_of_layers(tmp_path: Path) -> None:
    naive = saved(quantized(CASES["w8"]), tmp_path / "naive", format="naive-quantized")
    assert naive.read("model.layers.0.mlp.up_proj.weight").dtype == torch.int8
    assert naive.config["quantization_config"]["format"] == "naive-quantized"
    again = fxc.load_compressed_tensors(llama()[1], tmp_path / "naive")
    assert torch.equal(logits(again), logits(quantized(CASES["w8"])))
    both = [fxc.QuantizeWeights(bits=8, include="*mlp*"), fxc.QuantizeWeights(bits=4, group_size=32)]
    program = quantized(both)
    groups = saved(program, tmp_path / "both").config["quantization_config"]["config_groups"]
    assert sorted(g["weights"]["num_bits"] for g in groups.values()) == [4, 8]
    assert sorted(
        t.rpartition(".")[2] for g in groups.values() if g["weights"]["num_bits"] == 8 for t in g["targets"]
    ) == [
        "down_proj",
        "gate_proj",
        "up_proj",
    ]
    assert torch.equal(logits(fxc.load_compressed_tensors(llama()[1], tmp_path / "both")), logits(program))


def test_a_prefix_is_taken_off_and_put_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(), torch.randn(2, 32)
    model.inner = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    program = fxc.capture(model.eval(), (x,))
    rounded = fxc.QuantizeWeights(bits=4, group_size=-1)(program, fxc.Context(verify=False)).program
    names = Reader(fxc.save_compressed_tensors(rounded, tmp_path, prefix="inner.")).names
    parts = ("bias", "weight_packed", "weight_scale", "weight_shape")
    assert sorted(names) == [f"{layer}.{part}" for layer in (0, 2) for part in parts]
    with pytest.raises(ArtifactError, match="not in the program"):
        fxc.load_compressed_tensors(program, tmp_path)
    again = fxc.load_compressed_tensors(program, tmp_path, prefix="inner.")
    with torch.no_grad():
        assert torch.equal(again(x), rounded(x))


def convolution() -> fxc.Program:
    data = [torch.randn(2, 3, 8, 8)]
    program = fxc.capture(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), (data[0],))
    return fxc.QuantizeStatic()(program, fxc.Context(calibration=data)).program


REFUSED: dict[str, tuple[Callable[[], fxc.Program], str]] = {
    "float": (lambda: llama()[1], "not quantized"),
    "convolution": (convolution, "no place for a quantized part"),
    "zero points of bytes": (lambda: quantized([fxc.QuantizeWeights(bits=8, symmetric=False)]), "zero points have no"),
    "groups of 16": (lambda: quantized([fxc.QuantizeWeights(bits=4, group_size=16)]), "groups of 16"),
    "bias": (
        lambda: quantized([fxc.QuantizeStatic(ignore=("lm_head",))]),
        r"no place for .*bias(?s:.*)bias_correction",
    ),
    "one layer of two": (lambda: quantized([fxc.QuantizeWeights(bits=4, group_size=32, include="*mlp*")]), ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_refused(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    program = make()
    if not message:
        assert len(saved(program, tmp_path).config["quantization_config"]["ignore"]) == 5
        return
    with pytest.raises(UsageError, match=message):
        saved(program, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    program = quantized(CASES["w4"])
    saved(program, tmp_path)
    with pytest.raises(UsageError, match="quantized already"):
        fxc.load_compressed_tensors(program, tmp_path)
    with pytest.raises(UsageError, match="unknown checkpoint format"):
        saved(program, tmp_path, format="gguf")
    with pytest.raises(ArtifactError, match="configuration cannot be read"):
        saved(program, tmp_path, config=tmp_path / "none.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        fxc.load_compressed_tensors(llama()[1], tmp_path / "none")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format"] = "float-quantized"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="no integer weights"):
        fxc.load_compressed_tensors(llama()[1], tmp_path)
    other = fxc.capture(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    saved(program, tmp_path)
    with pytest.raises(ArtifactError, match="not in the program"):
        fxc.load_compressed_tensors(other, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match="cannot be read"):
        fxc.load_compressed_tensors(llama()[1], tmp_path)
