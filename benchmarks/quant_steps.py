"""How much of a W8A8 perplexity is chance: SmolLM2-135M by the formula alone, with steps that differ by a percent.

    python -m benchmarks.quant_steps [--quick] [--sequences 24] [--calibration 32] [--resume]

No line of fxcompress runs here. A weight row and the activations of a token are rounded to ``step = max|x| / divisor`` and
kept within [-128, 127]; 127 is what fxcompress does, 127.5 on both sides what compressed-tensors does. SmoothQuant is the
paper's equation 4 with strength 0.8 between each norm and the layers that read it, as in LLM Compressor's recipe. Both
divisors are legitimate choices, so the spread of a column is how far apart two results have to be to mean something.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks import harness, smollm
from benchmarks.harness import Json

#: Divisors of weights and of activations; ``None`` leaves them in float32.
DIVISORS: Final[tuple[tuple[float | None, float | None], ...]] = (
    (127.0, 127.0), (127.5, 127.5), (127.5, 127.0), (127.0, 127.5), (126.5, 127.0), (126.0, 127.0), (127.0, 126.5),
    (None, 127.0), (None, 127.5), (None, 126.5),
)  # fmt: skip
STRENGTH: Final = 0.8


def rounded(x: Tensor, divisor: float | None) -> Tensor:
    """``x`` with every last-dimension row on its own symmetric 8-bit grid."""
    if divisor is None:
        return x
    step = (x.abs().amax(-1, keepdim=True) / divisor).clamp_min(1e-12)
    return (x / step).round().clamp(-128, 127) * step


class Rounded(nn.Module):
    """A linear layer with rounded weights and inputs."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight = layer, layer.weight.detach()
        self.activations: float | None = None

    def set(self, weights: float | None, activations: float | None) -> None:
        """Take the float weight as it is now and round it."""
        self.weight, self.activations = rounded(self.layer.weight.detach(), weights), activations

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return nn.functional.linear(rounded(x, self.activations), self.weight, self.layer.bias)


def pairs(model: Any) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """Every norm of the decoder blocks with the layers that read it."""
    found: list[tuple[nn.Module, list[nn.Linear]]] = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        found.append((block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        found.append((block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    return found


@torch.no_grad()
def smooth(model: Any, sequences: Tensor) -> None:
    """Equation 4 of Xiao et al. 2023: ``s = max|x|^0.8 / max|w|^0.2`` per feature, moved from the norm into the weights."""
    largest: dict[nn.Module, Tensor] = {}

    def seen(norm: nn.Module, _: Any, output: Tensor) -> None:
        found = output.detach().abs().flatten(0, -2).amax(0)
        largest[norm] = torch.maximum(largest.get(norm, found), found)

    hooks = [norm.register_forward_hook(seen) for norm, _ in pairs(model)]
    for row in sequences:
        model(input_ids=row[None])
    for hook in hooks:
        hook.remove()
    for norm, layers in pairs(model):
        weights = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0).clamp_min(1e-5)
        factor = (largest[norm].pow(STRENGTH) / weights.pow(1 - STRENGTH)).clamp_min(1e-5)
        norm.weight.div_(factor)  # type: ignore[operator]
        for layer in layers:
            layer.weight.mul_(factor)


def wrap(model: Any) -> list[Rounded]:
    """Put a `Rounded` in place of every linear layer of the decoder blocks."""
    made = []
    for name, layer in smollm.projections(model).items():
        parent, _, leaf = name.rpartition(".")
        made.append(Rounded(layer))
        setattr(model.get_submodule(parent), leaf, made[-1])
    return made


def main() -> None:
    """Command line."""
    options = harness.arguments("Chance in a W8A8 perplexity.", sequences=24, calibration=32, resume=False)
    torch.set_num_threads(options.threads)
    count, samples = (2, 2) if options.quick else (options.sequences, options.calibration)
    held_out = smollm.windows("second", count)
    settings: dict[str, Json] = {"calibration": samples, "evaluation": count, "strength": STRENGTH}
    rows = harness.known("quant_steps", settings, options)
    for method in ("plain", f"SmoothQuant {STRENGTH}"):
        model = smollm.load()
        if method != "plain":
            smooth(model, smollm.windows("first", samples))
        layers = wrap(model)
        for weights, activations in DIVISORS[: 2 if options.quick else None]:
            name = f"{method}, {weights or 'float32'}, {activations or 'float32'}"
            if name in rows:
                continue
            for layer in layers:
                layer.set(weights, activations)
            value = smollm.perplexity(lambda ids, m=model: m(input_ids=ids).logits, held_out)  # type: ignore[misc]
            rows[name] = {"perplexity": value}
            print(f"{name}: perplexity {value:.3f}", flush=True)
            harness.write("quant_steps", rows, settings, options)


if __name__ == "__main__":
    main()
