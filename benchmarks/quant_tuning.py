"""What `TuneScales` brings on text it was not trained on: SmolLM2-135M, 4 bits, WikiText-2 and the sentences of STS-B.

    python -m benchmarks.quant_tuning [--quick] [--sequences 24] [--calibration 32]

Rotation, AWQ and GPTQ in groups of 64, then `TuneScales`, on the first half of WikiText-2. Scored before and after on its
second half and on the sentences of STS-B, one behind the other, which are another kind of text: the perplexity, and how far
the probabilities of the next token are from those of the float32 model. A model that only learned what WikiText looks like
would come nearer in the former alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

import fxcompress as fxc
from benchmarks import data, harness, smollm
from benchmarks.harness import Json

#: Sequences of STS-B.
_OTHER: Final = 8


def sentences(count: int) -> Tensor:
    """``count`` sequences [count, 512] at even distances in the sentences of STS-B."""
    text = " ".join(sentence for pair in data.sts_pairs()[0] for sentence in pair)
    ids = torch.tensor(smollm.tokenizer()(text)["input_ids"])
    starts = torch.linspace(0, len(ids) - smollm.LENGTH, count).long().tolist()
    return torch.stack([ids[s : s + smollm.LENGTH] for s in starts])


@torch.no_grad()
def scored(logits: Callable[[Tensor], Tensor], teacher: Callable[[Tensor], Tensor], texts: dict[str, Tensor]) -> Json:
    """Perplexity, and the divergence ``KL(float32 || model)`` in nat a token, of each text."""
    found: dict[str, Json] = {}
    for name, rows in texts.items():
        loss = kl = 0.0
        for row in rows:
            got, want = (f(row[None])[0].double().log_softmax(-1) for f in (logits, teacher))
            loss -= float(got[:-1].gather(1, row[1:, None]).mean())
            kl += float((want.exp() * (want - got)).sum(-1).mean())
        found[name] = {"perplexity": math.exp(loss / len(rows)), "divergence": kl / len(rows)}
    return found


def main() -> None:
    """Command line."""
    options = harness.arguments("Scales tuned on one text, scored on two.", sequences=24, calibration=32)
    torch.set_num_threads(options.threads)
    samples, count, others = (2, 2, 2) if options.quick else (options.calibration, options.sequences, _OTHER)
    texts = {"WikiText-2": smollm.windows("second", count), "STS-B": sentences(others)}
    settings: dict[str, Json] = {"calibration": samples, "WikiText-2": count, "STS-B": others}
    model, float_model = smollm.load(), smollm.load()
    calls = smollm.windows("first", samples)
    auto = torch.export.Dim.AUTO
    program = fxc.capture(model, (), {"input_ids": calls[:2, :32]}, dynamic_shapes={"input_ids": {0: auto, 1: auto}})
    context = fxc.Context(calibration=[{"input_ids": row[None]} for row in calls], verify=False, reference=program)

    def teacher(ids: Tensor) -> Tensor:
        logits: Tensor = float_model(input_ids=ids).logits
        return logits

    def of(program: fxc.Program) -> Json:
        return scored(lambda ids: program(input_ids=ids).logits, teacher, texts)

    rows: dict[str, Json] = {"float32": scored(teacher, teacher, texts)}
    rounding = fxc.QuantizeWeights(
        bits=4, group_size=64, method="awq+gptq", samples=samples, ignore=("lm_head",), progress=True
    )
    steps: dict[str, fxc.Pass] = {
        "Rotate, AWQ, GPTQ": fxc.Pipeline((fxc.Rotate(), rounding)),
        "the same, TuneScales": fxc.TuneScales(samples=samples, progress=True),
    }
    for name, step in steps.items():
        program = step(program, context).program
        program.gm.eval()
        rows[name] = of(program)
        print(f"{name}: {rows[name]}", flush=True)
        harness.write("quant_tuning", rows, settings, options)


if __name__ == "__main__":
    main()
