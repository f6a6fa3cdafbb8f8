"""The triton target: which operator each layer becomes, that engine and simulation agree, files, and what stays behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.engines.triton import TritonEngine
from fxcompress.engines.triton_fusion import fuse_quantization
from fxcompress.engines.triton_lowering import lower_to_kernels
from fxcompress.errors import UsageError
from fxcompress.kernel_testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_DEVICE = pytest.mark.skipif(DEVICE == "cuda", reason="what happens without a CUDA device")


class Block(nn.Module):
    """A pre-norm transformer MLP with a residual, and a head."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


class Gated(nn.Module):
    """RMSNorm spelled out as in Llama, and a gated MLP."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.gate, self.up = nn.Linear(width, 256, bias=False), nn.Linear(width, 256, bias=False)
        self.down = nn.Linear(256, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = self.weight * normed.to(x.dtype)
        return self.down(F.silu(self.gate(y)) * self.up(y))


class Vision(nn.Module):
    """Convolutions of every kind: strided, depthwise, pointwise, with another padding; a linear layer behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 32, 1)
        self.reflect = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.point(F.relu(self.depthwise(F.relu(self.stem(x))))))
        return self.head(F.relu(self.reflect(x)).mean((2, 3)))


def block(kind: Callable[[], nn.Module] = Block, dtype: torch.dtype = torch.float16) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().eval().to(dtype).to(DEVICE), torch.randn(2, 5, 128).to(dtype).to(DEVICE)


def prune24(model: nn.Module) -> nn.Module:
    """The smaller two of every four weights set to zero."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            groups = layer.weight.data.reshape(layer.out_features, -1, 4)
            kept = groups.abs().argsort(-1)[..., :2]
            groups.scatter_(-1, kept, 0.0)
    return model


FAMILIES: dict[str, tuple[list[fxc.Pass], bool, str]] = {
    "w4a16": ([fxc.QuantizeWeights(bits=4, group_size=64)], False, "w4a16_linear"),
    "w4a16 asymmetric": ([fxc.QuantizeWeights(bits=4, group_size=128, symmetric=False)], False, "w4a16_linear"),
    "w3a16 rows": ([fxc.QuantizeWeights(bits=3, group_size=-1)], False, "w4a16_linear"),
    "w8a16": ([fxc.QuantizeWeights(bits=8)], False, "w8a16_linear"),
    "w8a8": ([fxc.QuantizeDynamic()], False, "w8a8_linear"),
    "w4a8": ([fxc.QuantizeDynamic(weight_bits=4)], False, "w4a8_linear"),
    "2:4": ([fxc.Sparsify(pattern="2:4")], False, "sp24_linear"),
    "2:4 w8a8": ([fxc.QuantizeDynamic()], True, "sp24_w8a8_linear"),
    "2:4 w4a16": ([fxc.QuantizeWeights(bits=4, group_size=64)], True, "sp24_w4_linear"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_was_simulated(family: str, dtype: torch.dtype) -> None:
    passes, sparse, op = FAMILIES[family]
    model, x = block(dtype=dtype)
    model = prune24(model) if sparse else model
    engine = fxc.compile(model, (x,), passes=passes, target="triton", measure=False)
    assert engine.details["kernels"] == dict.fromkeys(("up", "down", "head"), op)
    assert engine.program is not None
    # The simulation itself is rounded to 16 bits at every step.
    allowed = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert relative_error(engine(x), engine.program(x)) < allowed
    assert engine(x).dtype == dtype
    assert engine(x[:1]).shape == (1, 5, 16)


@NO_DEVICE
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "2:4"])
def test_float32_programs_agree_closely(family: str) -> None:
    """In float32 nothing but the order of sums differs, except where a value falls on the other side of a tie."""
    passes, sparse, op = FAMILIES[family]
    model, x = block(dtype=torch.float32)
    model = prune24(model) if sparse else model
    engine = fxc.compile(model, (x,), passes=passes, target="triton", measure=False)
    ops = set(engine.details["kernels"].values())
    assert ops == {op if op != "sp24_w4_linear" else "w4a16_linear"}
    assert engine.program is not None
    assert relative_error(engine(x), engine.program(x)) < 2e-3


def test_static_int8_with_convolutions() -> None:
    torch.manual_seed(0)
    model, images = Vision().eval().to(DEVICE), torch.randn(8, 3, 16, 16, device=DEVICE)
    passes = [fxc.FuseActivations(), fxc.QuantizeStatic(samples=8)]
    engine = fxc.compile(model, (images[:2],), passes=passes, target="triton", calibration=[images], measure=False)
    kernels = engine.details["kernels"]
    assert {kernels[n] for n in ("stem", "depthwise", "point")} == {"conv2d_w8a8"} and kernels["head"] == "w8a8_linear"
    assert kernels["reflect"] == "conv2d_w8a8"  # captured as reflection padding and a plain convolution
    graph = json.loads((engine.folder / "program.json").read_text())
    assert not any(n["op"] == "call_module" and "fake_quantize" in n["target"] for n in graph["nodes"])
    assert engine.program is not None
    assert relative_error(engine(images), engine.program(images)) < 0.02


def test_a_convolution_no_kernel_has_runs_in_pytorch() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv1d(8, 8, 3).eval().to(DEVICE), torch.randn(4, 8, 20, device=DEVICE)
    engine = fxc.compile(
        model, (x,), passes=[fxc.QuantizeStatic(samples=4)], target="triton", calibration=[x], measure=False
    )
    assert engine.details["kernels"] == {} and "only 2-D convolutions" in engine.notes[0]


def test_epilogues_are_fused() -> None:
    """Bias, residual and activation are inside the operator; nothing of them is left in the graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 32), nn.ReLU6()).eval().half().to(DEVICE)
    x = torch.randn(3, 128, device=DEVICE).half()
    passes = [fxc.FuseActivations(), fxc.QuantizeWeights(bits=4, group_size=64)]
    engine = fxc.compile(model, (x,), passes=passes, target="triton", measure=False)
    graph = json.loads((engine.folder / "program.json").read_text())
    assert [n["target"] for n in graph["nodes"] if n["op"] == "call_function"] == [
        "fxcompress.w4a16_linear.default"
    ] * 2
    assert [n["kwargs"]["activation"] for n in graph["nodes"] if n["op"] == "call_function"] == ["silu", "relu6"]


def test_an_activation_no_kernel_has_follows_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.LeakyReLU(0.3)).eval().half().to(DEVICE)
    x = torch.randn(3, 128, device=DEVICE).half()
    passes = [fxc.FuseActivations(), fxc.QuantizeWeights(bits=4, group_size=64)]
    engine = fxc.compile(model, (x,), passes=passes, target="triton", measure=False)
    assert engine.program is not None and bool((engine(x) < 0).any())
    assert relative_error(engine(x), engine.program(x)) < 2e-3


# ------------------------------------------------------------------------------------------------ fused quantization
@pytest.mark.parametrize("kind", [Block, Gated])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantization_joins_the_norm_and_the_gate(kind: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Fused = unfused, bit for bit."""
    model, x = block(kind, dtype)
    program = fxc.QuantizeDynamic()(fxc.capture(model, (x,)), fxc.Context()).program
    plain, fused = program.clone(), program.clone()
    lower_to_kernels(plain)
    lower_to_kernels(fused)
    done = fuse_quantization(fused)
    expected = {
        Block: ["layer_norm_quantize", "activation_quantize"],
        Gated: ["rms_norm_quantize", "silu_mul_quantize"],
    }
    assert [d.split(":")[0] for d in done] == expected[kind]
    with torch.no_grad():
        assert torch.equal(plain(x), fused(x))


def test_a_norm_that_is_read_twice_is_not_fused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return y + self.linear(y)

    program = fxc.QuantizeDynamic()(fxc.capture(Twice().eval(), (torch.randn(2, 64),)), fxc.Context()).program
    lowered = program.clone()
    lower_to_kernels(lowered)
    assert fuse_quantization(lowered) == []


# ------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("family", ["w4a16", "w8a8", "2:4"])
def test_a_saved_engine_is_the_same_engine(family: str, tmp_path: Path) -> None:
    model, x = block()
    engine = fxc.compile(model, (x,), passes=FAMILIES[family][0], target="triton", measure=False)
    engine.save(tmp_path / "out")
    loaded = fxc.load(tmp_path / "out")
    assert isinstance(loaded, TritonEngine) and torch.equal(loaded(x), engine(x))
    kinds = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt", ".md"}


def test_four_bits_are_stored_in_four_bits() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(1024, 1024, bias=False).eval().half().to(DEVICE), torch.randn(2, 1024, device=DEVICE).half()
    engine = fxc.compile(model, (x,), passes=[fxc.QuantizeWeights(bits=4)], target="triton", measure=False)
    ideal = 1024 * 1024 * (0.5 + 2 / 128)
    assert engine.file_size() < 1.02 * ideal + 4096


def test_another_layout_version_is_refused(tmp_path: Path) -> None:
    model, x = block()
    engine = fxc.compile(model, (x,), passes=FAMILIES["w4a16"][0], target="triton", measure=False)
    details: dict[str, Any] = {**engine.details, "layouts": [{"name": "planes4", "version": 99}]}
    with pytest.raises(UsageError, match="layout planes4 version 99"):
        TritonEngine(engine.folder, engine.signature, details=details)
    with pytest.raises(UsageError, match="unknown layout 'spirals'"):
        TritonEngine(
            engine.folder, engine.signature, details={**details, "layouts": [{"name": "spirals", "version": 1}]}
        )


# ------------------------------------------------------------------------------------------------ what is said
@NO_DEVICE
def test_without_a_device_it_says_so() -> None:
    model, x = block()
    engine = fxc.compile(model, (x,), passes=FAMILIES["w4a16"][0], target="triton")
    assert any("no CUDA device" in note for note in engine.notes)
    assert engine.report.speedup is None and any("speed was not measured" in d for d in engine.report.decisions)


def test_a_group_no_kernel_has_runs_in_pytorch_and_is_noted() -> None:
    model, x = block()
    engine = fxc.compile(model, (x,), passes=[fxc.QuantizeWeights(group_size=16)], target="triton", measure=False)
    assert engine.details["kernels"] == {} and len([n for n in engine.notes if "runs in PyTorch" in n]) == 3
    assert engine.program is not None and relative_error(engine(x), engine.program(x)) < 1e-3


def test_engine_options_reach_the_target() -> None:
    model, x = block()
    with pytest.raises(UsageError, match="engine_options need a target"):
        fxc.compile(model, (x,), passes=[], engine_options={"torch_compile": True})


def test_the_lowered_graph_compiles_whole() -> None:
    model, x = block()
    engine = fxc.compile(model, (x,), passes=[fxc.QuantizeDynamic()], target="triton", measure=False)
    assert isinstance(engine, TritonEngine)
    compiled = torch.compile(engine._read(), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            y = torch.randn(batch, 5, 128, device=DEVICE).half()
            assert torch.equal(compiled(y)[0], engine(y))
