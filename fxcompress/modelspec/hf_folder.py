"""``hf:FOLDER``: a local transformers model; nothing is downloaded and no code of the folder runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fxcompress.errors import ModelSpecError
from fxcompress.modelspec.hf_inputs import example_inputs, preprocessing
from fxcompress.modelspec.resolved import ResolvedModel, import_optional

__all__ = ["from_hf"]


def from_hf(spec: str, rest: str) -> ResolvedModel:
    """The model of the class the folder's config names, in float32. Raises ModelSpecError when it cannot be loaded."""
    folder = Path(rest)
    if not (folder / "config.json").is_file():
        fix = "give the folder that save_pretrained wrote; nothing is downloaded"
        raise ModelSpecError(12, f"{folder} holds no config.json", fix=fix)
    transformers = import_optional("transformers")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # a cache is state; one forward pass is what is captured
        with _no_bars(transformers):
            module, note = _load(transformers, folder, config, local)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip()[:500]}"
        fix = "models with code of their own are not run"
        raise ModelSpecError(13, f"transformers cannot load {folder}", why=why, fix=fix) from error
    name = f"{type(module).__name__} ({folder.resolve().name})"
    images = preprocessing(_json(folder / "preprocessor_config.json"))
    return ResolvedModel(spec, "hf", name, module, (), example_inputs(module), images, notes=[note] if note else [])


@contextmanager
def _no_bars(transformers: Any) -> Iterator[None]:
    """Keep transformers from drawing its own progress bars."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load(transformers: Any, folder: Path, config: Any, local: dict[str, Any]) -> tuple[nn.Module, str]:
    """The model, and a note when not all of its weights are in the folder."""
    named = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    cls: Any = named if is_model else transformers.AutoModel
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        build = getattr(cls, "_from_config", None) or cls.from_config
        return cast(nn.Module, build(config)), "random weights: the folder holds none; accuracy means nothing"
    options = local | {"config": config, "dtype": torch.float32, "output_loading_info": True}
    module, info = cls.from_pretrained(folder, **options)
    missing = len(info["missing_keys"])
    return module, f"{missing} tensors are not in the folder and are random" if missing else ""


def _json(path: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(path.read_text())) if path.is_file() else {}
