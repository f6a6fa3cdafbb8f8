"""Example inputs and image preprocessing of transformers models, from their configuration alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.preprocess import Preprocessing

__all__ = ["example_inputs", "preprocessing"]

_LENGTH = 128
_DECODER_LENGTH = 16
_AUDIO_SAMPLES = 16_000


def example_inputs(module: nn.Module) -> dict[str, Tensor]:
    """Keyword inputs of batch 1 for a transformers model: token ids, pixels, spectrogram or waveform.

    Args:
        module: A ``PreTrainedModel``; its config gives vocabulary, image size and so on.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 [1, 128] (shorter where positions end earlier), ``pixel_values``
        float32 [1, channels, height, width], ``input_features`` [1, mels, frames], ``input_values`` [1, 16000], and
        ``decoder_input_ids`` [1, 16] for an encoder-decoder. Empty when the model takes none of these.
    """
    config: Any = module.config
    accepted = set(inspect.signature(module.forward).parameters)
    main = str(getattr(module, "main_input_name", "input_ids"))
    both = hasattr(config, "text_config") and hasattr(config, "vision_config")
    names = ("input_ids", "pixel_values") if both else (main,)
    inputs: dict[str, Tensor] = {}
    for name in names:
        if name in accepted and name in _MAKERS:
            inputs |= _MAKERS[name](config)
    if inputs and getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _tokens(config, _DECODER_LENGTH)
    return {name: value for name, value in inputs.items() if name in accepted}


def preprocessing(config: dict[str, Any]) -> Preprocessing | None:
    """What ``preprocessor_config.json`` says about images; None when it says nothing."""
    if "image_mean" not in config or "image_std" not in config:
        return None
    crop, size = _side(config.get("crop_size")), _side(config.get("size"))
    share = crop / size if crop and size and config.get("do_center_crop") else 1.0
    kinds = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    kind = kinds.get(config.get("resample", 2), "bilinear")
    return Preprocessing(tuple(config["image_mean"]), tuple(config["image_std"]), min(1.0, share), kind)


def _side(size: Any) -> int:
    """The shorter side of ``224``, ``{"shortest_edge": 224}`` or ``{"height": 224, "width": 224}``."""
    if isinstance(size, dict):
        sides = [size[k] for k in ("shortest_edge", "height", "width") if k in size]
        return int(min(sides)) if sides else 0
    return int(size or 0)


def _part(config: Any, name: str) -> Any:
    return getattr(config, name, config)


def _tokens(config: Any, length: int) -> Tensor:
    return torch.randint(0, int(_part(config, "text_config").vocab_size), (1, length))


def _text(config: Any) -> dict[str, Tensor]:
    text = _part(config, "text_config")
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or _LENGTH
    length = min(_LENGTH, int(positions))
    return {"input_ids": _tokens(config, length), "attention_mask": torch.ones(1, length, dtype=torch.int64)}


def _pixels(config: Any) -> dict[str, Tensor]:
    vision = _part(config, "vision_config")
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return {"pixel_values": torch.randn(1, int(getattr(vision, "num_channels", 3)), height, width)}


def _spectrogram(config: Any) -> dict[str, Tensor]:
    frames = 2 * int(getattr(config, "max_source_positions", 1500))
    return {"input_features": torch.randn(1, int(getattr(config, "num_mel_bins", 80)), frames)}


def _waveform(config: Any) -> dict[str, Tensor]:
    del config
    return {"input_values": torch.randn(1, _AUDIO_SAMPLES)}


_MAKERS: dict[str, Any] = {
    "input_ids": _text,
    "pixel_values": _pixels,
    "input_features": _spectrogram,
    "input_values": _waveform,
}
