"""``timm:NAME[@WEIGHTS]``: an architecture of timm."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import ModelSpecError
from fxcompress.modelspec.resolved import PICKLES, ResolvedModel, import_optional
from fxcompress.preprocess import Preprocessing

__all__ = ["from_timm"]


def from_timm(spec: str, rest: str) -> ResolvedModel:
    """A timm model with random, given or downloaded weights. Raises ModelSpecError with the nearest names."""
    timm = import_optional("timm")
    name, _, weights = rest.partition("@")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        fix = f"did you mean {' or '.join(f'timm:{n}' for n in near)}?" if near else "timm.list_models() lists them all"
        raise ModelSpecError(7, f"timm has no model {name!r}", fix=fix)
    tensors = _read_safetensors(Path(weights)) if weights not in ("", "pretrained") else None
    try:
        options = _head_size(timm, name, tensors)
        module = timm.create_model(name, pretrained=weights == "pretrained", **options)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip()[:300]}"
        fix = f"with a local file: timm:{name}@FILE.safetensors" if weights == "pretrained" else ""
        raise ModelSpecError(8, f"timm cannot build {name!r}", why=why, fix=fix) from error
    notes = []
    if tensors is not None:
        _load_tensors(spec, module, tensors)
    elif not weights:
        notes.append("random weights: accuracy means nothing (timm:NAME@FILE.safetensors or timm:NAME@pretrained)")
    config = timm.data.resolve_data_config({}, model=module)
    images = Preprocessing(tuple(config["mean"]), tuple(config["std"]), config["crop_pct"], config["interpolation"])
    example = torch.randn(1, *config["input_size"])
    return ResolvedModel(spec, "timm", name, module, (example,), {}, images, notes=notes)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        why = "a pickle runs code when it is opened" if path.suffix in PICKLES else ""
        fix = "convert it once: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')"
        raise ModelSpecError(9, f"{path} is not a .safetensors file", why=why, fix=fix)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelSpecError(10, f"the weights {path} cannot be read", why=str(error)) from error


def _head_size(timm: Any, name: str, tensors: dict[str, Tensor] | None) -> dict[str, int]:
    """``num_classes`` when the checkpoint's classifier has another number than the architecture's default."""
    classifier = timm.get_pretrained_cfg_value(name, "classifier") if tensors else None
    weight = tensors.get(f"{classifier}.weight") if tensors and isinstance(classifier, str) else None
    return {} if weight is None else {"num_classes": int(weight.shape[0])}


def _load_tensors(spec: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        why = " ".join(line.strip()[:200] for line in str(error).splitlines()[1:4])
        raise ModelSpecError(11, "the weights do not fit the model", where=spec, why=why) from error
