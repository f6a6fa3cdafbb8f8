"""From options to objects: the captured program, the target's scheme, the passes, what is known of the inputs."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.capture import capture
from fxcompress.cli.datafiles import LABELS, InputFacts, logits_of
from fxcompress.engines import registered_targets, target
from fxcompress.errors import UsageError
from fxcompress.ir import Program, evaluating, forward_names
from fxcompress.modelspec import ResolvedModel
from fxcompress.passbase import Pass, registered_passes
from fxcompress.passes import QuantizeStatic
from fxcompress.pipeline import Pipeline
from fxcompress.preprocess import IMAGENET, Preprocessing
from fxcompress.quant.observers import make_observer
from fxcompress.quant.scheme import QuantScheme

__all__ = ["capture_model", "chosen_passes", "example_batch", "input_facts", "require_example", "scheme_of"]


def require_example(model: ResolvedModel) -> None:
    """Raise UsageError when no example inputs are known."""
    if not model.has_example:
        raise UsageError(51, f"{model.spec} brings no example inputs", fix="add --input-shape 1,3,224,224, or --data")


def capture_model(model: ResolvedModel) -> Program:
    """Capture the model with its example inputs.

    Raises:
        UsageError: no example is known.
        CaptureError: the model cannot be captured.
    """
    module = model.require_module()
    require_example(model)
    return capture(module, model.args, model.kwargs, dynamic_shapes=model.dynamic_shapes)


def scheme_of(name: str) -> tuple[str, QuantScheme]:
    """The target's name and quantization scheme; ``auto`` is the first one that is installed.

    Schemes are known without the runtime, so a target need not be installed for this.
    """
    if name != "auto":
        return name, target(name).scheme()
    known = {n: t for n, t in registered_targets().items() if t.automatic}
    installed = [n for n, t in known.items() if t.available() is None]
    chosen = (installed or list(known))[0]
    return chosen, known[chosen].scheme()


def example_batch(program: Program) -> int:
    """Size of dimension 0 of the first tensor in the program's example."""
    tensors = [v for v in pytree.tree_leaves(program.example) if isinstance(v, Tensor) and v.dim() > 0]
    return int(tensors[0].shape[0]) if tensors else 1


# ------------------------------------------------------------------------------------------------------------ passes
def chosen_passes(
    text: str | None, calibrator: str, samples: int, ignore: Sequence[str], calibrated: bool
) -> tuple[Pass, ...] | None:
    """The passes to run; None leaves the choice to ``compile``.

    Args:
        text: ``--passes``: names separated by commas, or a ``.json`` file with recipe entries.
        calibrator: For every QuantizeStatic.
        samples: For every QuantizeStatic.
        ignore: Added to every QuantizeStatic.
        calibrated: There is calibration data.

    Raises:
        UsageError: an unknown pass (with the nearest name), or a file that is no recipe.
    """
    from fxcompress.api import default_passes

    plain = QuantizeStatic()
    make_observer(calibrator)
    asked = dataclasses.replace(plain, calibrator=calibrator, samples=samples, ignore=tuple(ignore))
    if text is None:
        usual = (asked.calibrator, asked.ignore) == (plain.calibrator, plain.ignore) and samples <= plain.samples
        if usual or not calibrated:
            return None
        return tuple(asked if isinstance(p, QuantizeStatic) else p for p in default_passes(quantize=True))
    passes = _recipe(Path(text)) if text.endswith(".json") else [_named(name) for name in text.split(",")]
    return tuple(asked if p == plain else p for p in passes)


def _named(name: str) -> Pass:
    """A pass by name, in any spelling: ``FoldBatchNorm``, ``fold-batch-norm``."""
    known = {n.lower(): c for n, c in registered_passes().items() if c is not Pipeline}
    key = name.strip().replace("-", "").replace("_", "").lower()
    if key not in known:
        names = {n: c.__name__ for n, c in known.items()}
        near = difflib.get_close_matches(key, names, 1)
        fix = f"did you mean {names[near[0]]}?" if near else f"known: {', '.join(sorted(names.values()))}"
        raise UsageError(83, f"there is no pass {name.strip()!r}", fix=fix)
    return known[key]()


def _recipe(path: Path) -> list[Pass]:
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            84, f"{path} is no recipe", why=str(error), fix='write [{"name": "FoldBatchNorm"}, ...]'
        ) from error
    entries = entries.get("passes", []) if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UsageError(84, f"{path} is no recipe", fix='write [{"name": "FoldBatchNorm"}, ...]')
    return [Pass.from_dict(entry) for entry in entries]


# ------------------------------------------------------------------------------------------------------------ inputs
def input_facts(model: ResolvedModel, mean: str | None, std: str | None) -> InputFacts:
    """What is known of the model's inputs; runs it once on its example to count the classes."""
    module = model.require_module()
    how = model.preprocessing or IMAGENET
    if mean is not None or std is not None:
        how = Preprocessing(
            _numbers("--mean", mean, how.mean), _numbers("--std", std, how.std), how.crop, how.interpolation
        )
    return InputFacts(_input_names(module, model), _image_shape(model), _classes(module, model), how)


def _input_names(module: nn.Module, model: ResolvedModel) -> tuple[str, ...]:
    """Names of forward; one that usually means a label only counts when the example has it."""
    names = forward_names(module)
    sure = [*model.kwargs, *names[: len(model.args)]]
    return (*sure, *(n for n in names if n not in sure and n not in LABELS))


def _image_shape(model: ResolvedModel) -> tuple[int, int, int] | None:
    """Channels, height and width of the first input, or of ``pixel_values``, when it looks like an image."""
    first = model.kwargs.get("pixel_values", model.args[0] if model.args else None)
    if not isinstance(first, Tensor) or first.dim() != 4 or first.shape[1] not in (1, 3):
        return None
    return int(first.shape[1]), int(first.shape[2]), int(first.shape[3])


def _classes(module: nn.Module, model: ResolvedModel) -> int | None:
    if not model.has_example:
        return None
    with torch.no_grad(), evaluating(module):
        try:
            return int(logits_of(module(*model.args, **model.kwargs)).shape[-1])
        except (UsageError, RuntimeError, TypeError, ValueError):
            return None  # capture will say what is wrong with it


def _numbers(option: str, text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if text is None:
        return default
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or (option == "--std" and min(values) <= 0):
        raise UsageError(85, f"{option} {text} is not 1 or 3 numbers", fix=f"{option} 0.485,0.456,0.406")
    return values
