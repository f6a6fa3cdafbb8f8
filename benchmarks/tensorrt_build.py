"""What TensorRT makes of fifteen networks: quantized layers that run on integers, residual adds, reformats, parity.

    python -m benchmarks.tensorrt_build [--quick] [--networks resnet50,gpt2] [--capability 8.0]

No GPU: TensorRT for RTX builds for a device that is not there, and its layer list says what every kernel reads and writes.
The file it is built from is compared with the simulated graph in ONNX Runtime. Weights are random, transformers have two
layers. Networks that were measured before are kept when others are asked for. ``--quick`` takes smaller images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from benchmarks import harness, torchvision_cpu
from benchmarks.models import SEED, efficientnet_lite0

CLAIM: Final = "tensorrt_build"
IMAGES: Final = (
    "resnet50", "mobilenet_v2", "efficientnet_lite0", "efficientnet_b0", "densenet121", "shufflenet_v2_x1_0",
    "convnext_tiny", "vit_b_16", "swin_t",
)  # fmt: skip
Batch = Tensor | dict[str, Tensor]


class Recurrent(nn.Module):
    """Convolutions over time, two bidirectional LSTM layers, a classifier per frame."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(80, 256, 3, 2, 1), nn.ReLU(), nn.Conv1d(256, 256, 3, 2, 1), nn.ReLU())
        self.lstm = nn.LSTM(256, 128, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.lstm(self.features(x).transpose(1, 2))[0]))


class UNet(nn.Module):
    """Three levels with skips: strided convolutions down, transposed ones up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down1, self.down2 = _conv(3, 32), _conv(32, 64, 2), _conv(64, 128, 2)
        self.up1, self.up2 = nn.ConvTranspose2d(128, 64, 2, 2), nn.ConvTranspose2d(64, 32, 2, 2)
        self.join1, self.join2, self.last = _conv(128, 64), _conv(64, 32), nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.down1(a)
        y = self.join1(torch.cat([torch.relu(self.up1(self.down2(b))), b], 1))
        return cast(Tensor, self.last(self.join2(torch.cat([torch.relu(self.up2(y)), a], 1))))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes: Any = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 1536}
    return cast(nn.Module, BertModel(BertConfig(vocab_size=1000, **sizes)))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return cast(nn.Module, GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_layer=2, use_cache=False)))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 576, "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=1000, intermediate_size=1536, use_cache=False, **sizes)
    return cast(nn.Module, LlamaForCausalLM(config))


OTHERS: Final[dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "minilm (2 layers)": (_bert, (32,)),
    "gpt2 (2 layers)": (_gpt2, (32,)),
    "llama (2 layers)": (_llama, (32,)),
    "lstm": (Recurrent, (80, 64)),
    "unet": (UNet, (3, 64, 64)),
}


def network(name: str, side: int) -> tuple[nn.Module, Callable[[int], Batch]]:
    """A network with random weights, and what makes its batches."""
    torch.manual_seed(SEED)
    if name in OTHERS:
        make, shape = OTHERS[name]
        return make().eval(), lambda count: _batch(shape, count)
    side = 224 if name == "vit_b_16" else side
    if name == "efficientnet_lite0":
        model = efficientnet_lite0()
    else:
        torchvision_cpu.prepare()
        from torchvision.models import get_model

        model = cast(nn.Module, get_model(name, weights=None)).train()
        with torch.no_grad():
            for weight in (p for p in model.parameters() if p.dim() > 1 and not p.any()):
                nn.init.normal_(weight, std=0.02)  # a head of zeros would agree with anything
            model(torch.randn(4, 3, side, side))  # BatchNorm statistics that are not the identity
    for path, weight in model.named_parameters():
        if path.endswith("layer_scale"):  # begins at 1e-6, which float16 hardly has; trained ones are larger
            nn.init.constant_(weight, 0.1)
    return model.eval(), lambda count: _batch((3, side, side), count)


def _batch(shape: tuple[int, ...], count: int) -> Batch:
    if len(shape) > 1:
        return torch.randn(count, *shape)
    return {"input_ids": torch.randint(0, 1000, (count, *shape))}


def passes_of(precision: str) -> tuple[Any, ...]:
    import fxcompress as fxc
    from fxcompress.api import default_passes

    exact = default_passes(quantize=False)
    return {
        "INT8": default_passes(quantize=True),
        "INT8, FP16": (*default_passes(quantize=True), fxc.passes.Cast()),
        "FP16": (*exact, fxc.passes.Cast()),
        "INT4 weights, FP16": (*exact, fxc.passes.Cast(), fxc.passes.QuantizeWeights(bits=4, fit="adjust")),
    }[precision]


PRECISIONS: Final = ("INT8", "INT8, FP16", "FP16", "INT4 weights, FP16")


def measure(name: str, precision: str, capability: str, side: int) -> dict[str, Any]:
    """Build one engine; errors of a network become the text of its row."""
    import fxcompress as fxc
    from fxcompress.engines import target
    from fxcompress.parity import check_parity
    from fxcompress.passbase import Context

    model, batches = network(name, side)
    first = batches(2)
    program = fxc.capture(model, (), first) if isinstance(first, dict) else fxc.capture(model, (first,))
    context = Context(scheme=target("tensorrt").scheme(), calibration=[batches(4)])
    plain = fxc.Pipeline(passes_of("INT8")[:-1])(program, context).program
    begin = time.perf_counter()
    try:
        simulated = fxc.Pipeline(passes_of(precision))(program, context).program
        quantized = time.perf_counter()
        made: Any = target("tensorrt")
        engine = made.build(simulated, compute_capability=capability)
        built = time.perf_counter()
        parity = check_parity(engine, simulated, [batches(2)], reference=plain)
    except fxc.errors.FxcError as error:
        return {"error": f"{error.id} {error.what}"}
    report = engine.plans[0].report
    return {
        **report.to_dict(),
        "plan_mb": (engine.folder / engine.plans[0].file).stat().st_size / 1e6,
        "passes_s": quantized - begin,
        "build_s": built - quantized,
        "parity": parity.to_dict(),
        "library": engine.plans[0].made_for,
        "notes": engine.notes,
    }


def main() -> None:
    """Measures and writes after every network."""
    options = harness.arguments(__doc__ or "", networks="", capability="8.0", precisions="")
    torch.set_num_threads(options.threads)
    asked = [n.strip() for n in options.networks.split(",") if n.strip()] or [*IMAGES, *OTHERS]
    precisions = [p.strip() for p in options.precisions.split(";") if p.strip()] or list(PRECISIONS)
    results = _before(options)
    for name in asked:
        for precision in precisions:
            row = measure(name, precision, options.capability, 64 if options.quick else 224)
            results.setdefault(name, {})[precision] = row
            print(name, precision, row.get("error") or (row["layers"] and _counts(row)), flush=True)
        harness.write(CLAIM, results, {"capability": options.capability}, options)


def _before(options: argparse.Namespace) -> dict[str, Any]:
    path = harness.RESULTS / f"{CLAIM}{'_quick' if options.quick else ''}.json"
    return dict(json.loads(path.read_text())["results"]) if path.exists() else {}


def _counts(row: dict[str, Any]) -> str:
    kinds = list(row["layers"].values())
    return ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))


if __name__ == "__main__":
    main()
