"""Tables of the quantization claims; `benchmarks.tables` puts them into the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from benchmarks.harness import table

__all__ = ["TABLES"]

Results = Mapping[str, Any]
OURS: Final = "fxcompress "


def qat(found: Results) -> str:
    """Accuracy of each method and width, in the simulation and in the engine."""
    rows = found["variants"]
    ground = rows["float"]["mean_accuracy"]
    lines = [[name, *_seeds(row), f"{row['mean_accuracy'] - ground:+.2f}"] for name, row in rows.items()]
    seeds = len(next(iter(rows.values()))["accuracy"])
    heads = ["method, bits", "accuracy % of the simulation", "of the engine", "against float"]
    bars = [[name, "yes" if holds else "no"] for name, holds in found["bars"].items()]
    note = f"Mean of {seeds} seeds." if seeds > 1 else "One seed."
    return f"{table(heads, lines)}\n\n{table(['expected', 'holds'], bars)}\n\n{note}\n"


def _seeds(row: Results) -> list[str]:
    engine = [v for v in row["engine_accuracy"].values() if v is not None]
    return [f"{row['mean_accuracy']:.2f}", f"{sum(engine) / len(engine):.2f}" if engine else ""]


def text(found: Results) -> str:
    """Score and drop of each way to quantize MiniLM."""
    lines = [
        [_arrow(n), f"{r['spearman']:.4f}", f"{r['drop']:+.4f}", f"{r['allowed']:.3f}" if "allowed" in r else ""]
        for n, r in found.items()
        if "spearman" in r
    ]
    failed = [f"`{n}` does not run: {r['error'].splitlines()[0]}" for n, r in found.items() if "error" in r]
    return "\n\n".join([table(["engine", "Spearman", "drop", "allowed"], lines), *failed]) + "\n"


def _arrow(name: str) -> str:
    method, arrow, runtime = name.partition(" -> ")
    return f"{OURS}{method}, {runtime}" if arrow else name


def decode(found: Results) -> str:
    """Time of one token in each engine, fastest first."""
    parts = []
    for runtime, race in found.items():
        floats = [n for n in race["engines"] if n.endswith("float32") and "MatMulNBits" not in n]
        lines = []
        for name, row in sorted(race["engines"].items(), key=lambda item: item[1]["p50_ms"]):
            times = [_times(race["comparison"].get(f"{slow} / {name}")) for slow in floats]
            error = f"{race['logits'][name]['relative_error']:.2g}"
            lines.append([name, f"{row['p50_ms']:.2f}", f"{row['settings']['megabytes']:.0f}", *times, error])
        heads = [runtime, "p50 ms", "MB", *(f"x faster than {slow}" for slow in floats), "error of the logits"]
        parts.append(table(heads, lines))
    return "\n\n".join(parts) + "\n"


def _times(over: Results | None) -> str:
    return f"{over['times_faster']:.2f} [{', '.join(f'{v:.2f}' for v in over['interval'])}]" if over else ""


def peers(found: Results) -> str:
    """Perplexity of each quantizer, the share of the gap it closes, its time and memory."""
    rows = {n: r for n, r in found.items() if "error" not in r}
    ground = rows[f"{OURS}float32"]["perplexity"] if f"{OURS}float32" in rows else None
    lines = []
    for name, row in rows.items():
        base = rows.get(f"{OURS}RTN, asymmetric" if "asymmetric" in name else f"{OURS}RTN")
        gap = None if base is None or ground is None else base["perplexity"] - ground
        four = "W8A8" not in name and "3 bits" not in name and gap
        closed = f"{(base['perplexity'] - row['perplexity']) / gap:.1%}" if four and base is not None and gap else ""
        times = "" if ground is None else f"{row['perplexity'] / ground:.3f}"
        lines.append(
            [name, f"{row['perplexity']:.3f}", times, closed, f"{row['seconds']:.0f}", f"{row['peak_of_weights']:.2f}"]
        )
    failed = [f"`{n}` does not run: {r['error']}" for n, r in found.items() if "error" in r]
    heads = ["SmolLM2-135M", "perplexity", "x float32", "of the gap to RTN closed", "s", "peak memory, x weights"]
    return "\n\n".join([table(heads, lines), *failed]) + "\n"


def cost(found: Results) -> str:
    """Time and memory of one method, ours and the peers'."""
    lines = [
        [n, f"{r['seconds']:.0f}", f"{r['peak_of_weights']:.2f}", f"{r['perplexity']:.3f}"]
        for n, r in found.items()
        if "error" not in r
    ]
    return table(["SmolLM2-135M", "s", "peak memory, x weights", "perplexity"], lines) + "\n"


def steps(found: Results) -> str:
    """Perplexity for every pair of divisors, without and with SmoothQuant."""
    methods = list(dict.fromkeys(name.partition(", ")[0] for name in found))
    divisors = list(dict.fromkeys(name.partition(", ")[2] for name in found))
    lines = []
    for pair in divisors:
        rows = [found.get(f"{method}, {pair}") for method in methods]
        lines.append([*pair.split(", "), *(f"{row['perplexity']:.3f}" if row else "" for row in rows)])
    return table(["weights: max / ", "activations: max / ", *methods], lines) + "\n"


def tuning(found: Results) -> str:
    """Perplexity and divergence of two texts, before and after scales were tuned."""
    texts = list(found["float32"])
    lines = []
    for name, row in found.items():
        cells = [(f"{row[t]['perplexity']:.3f}", f"{row[t]['divergence']:.4f}") for t in texts]
        lines.append([name, *(cell for pair in cells for cell in pair)])
    heads = [head for t in texts for head in (f"{t}: perplexity", "divergence, nat")]
    return table(["SmolLM2-135M", *heads], lines) + "\n"


def repair(found: Results) -> str:
    """Accuracy before and after repair."""
    names = {"top1": "top-1 %", "top1_held_out": "held out %", "agreement": "agreement %"}
    ground = found["float32"]
    lines = []
    for name, row in found.items():
        if "error" not in row:
            cells = [f"{100 * row[key]:.2f}" for key in names]
            drops = [f"{100 * (ground[key] - row[key]):+.2f}" for key in ("top1", "top1_held_out")]
            lines.append([name, *cells, *drops, f"{row['seconds']:.0f}" if "seconds" in row else ""])
    failed = [f"`{n}` is refused: {r['error'].splitlines()[0]}" for n, r in found.items() if "error" in r]
    heads = ["EfficientNet-Lite0", *names.values(), "drop", "drop, held out", "s"]
    return "\n\n".join([table(heads, lines), *failed]) + "\n"


def search(found: Results) -> str:
    """What ``passes="auto"`` found, and its time over that of the default pipeline."""
    lines = []
    for network, targets in found.items():
        for runtime, row in targets.items():
            accuracy, over = row["accuracy"], row["auto_over_hand_picked"]
            floats = ", ".join(f"{r['median']:.2f}" for r in row["auto_over_float"].values())
            drops = [a["before"] - a["after"] for a in (accuracy, row["hand_picked_accuracy"])]
            times = f"{over['median']:.3f} [{over['low']:.3f}, {over['high']:.3f}]"
            cells = [f"{accuracy['max_drop']:.3f}", *(f"{drop:+.4f}" for drop in drops)]
            lines.append([network, runtime, *cells, times if drops[1] <= accuracy["max_drop"] else "", floats])
    heads = ["network", "engine", "allowed", "drop", "of the default passes", "time over theirs", "over float32"]
    return table(heads, lines) + "\n"


TABLES: Final[Mapping[str, Callable[[Results], str]]] = {
    "quant_qat": qat,
    "quant_text": text,
    "quant_decode": decode,
    "quant_peers": peers,
    "quant_tuning": tuning,
    "quant_gptq": cost,
    "quant_steps": steps,
    "quant_repair": repair,
    "quant_auto": search,
}
