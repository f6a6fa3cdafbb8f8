"""How an image becomes an input: resize, centre crop, scale to [0, 1], normalize."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompress.errors import CalibrationError, MissingRuntimeError

__all__ = ["IMAGENET", "Preprocessing", "image_tensor"]


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation preprocessing of an image classifier.

    Attributes:
        mean: Mean per channel, of pixels in [0, 1].
        std: Standard deviation per channel.
        crop: Side of the crop over the shorter side after resizing (timm's ``crop_pct``).
        interpolation: ``bilinear``, ``bicubic`` or ``nearest``.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 0.875
    interpolation: str = "bilinear"

    def for_channels(self, channels: int) -> Preprocessing:
        """The same for another number of channels: one channel gets the mean over the colours."""
        if len(self.mean) == channels:
            return self
        mean, std = sum(self.mean) / len(self.mean), sum(self.std) / len(self.std)
        return Preprocessing((mean,) * channels, (std,) * channels, self.crop, self.interpolation)


#: ImageNet's statistics, as torchvision uses them.
IMAGENET = Preprocessing()


def image_tensor(
    source: Path | bytes | np.ndarray[Any, Any], shape: tuple[int, int, int], how: Preprocessing
) -> Tensor:
    """One image as float32 [channels, height, width].

    The shorter side is resized (with antialiasing) so that the crop is ``how.crop`` of it, then the middle is cut out,
    as torchvision's ``Resize`` and ``CenterCrop`` do.

    Args:
        source: A file, the bytes of one, or uint8 [height, width] or [height, width, channels].
        shape: Channels (1 or 3), height and width to return.
        how: Statistics and crop.

    Raises:
        CalibrationError: the image cannot be decoded.
        MissingRuntimeError: Pillow is not installed.
    """
    channels, height, width = shape
    image = _open(source, "L" if channels == 1 else "RGB")
    image = _resize(image, round(height / how.crop), round(width / how.crop), how.interpolation)
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    fitted = how.for_channels(channels)
    mean, std = np.array(fitted.mean, dtype=np.float32), np.array(fitted.std, dtype=np.float32)
    normal = (pixels.reshape(height, width, channels) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))


def _open(source: Path | bytes | np.ndarray[Any, Any], mode: str) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise MissingRuntimeError(22, "images need Pillow", fix="pip install pillow") from None
    if isinstance(source, np.ndarray):
        gray = source.ndim == 3 and source.shape[-1] == 1
        return Image.fromarray(source[..., 0] if gray else source).convert(mode)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert(mode)
    except (OSError, UnidentifiedImageError) as error:
        name = "an image" if isinstance(source, bytes) else str(source)
        raise CalibrationError(26, f"{name} cannot be read", why=str(error), fix="remove or mend it") from error


def _resize(image: Any, height: int, width: int, interpolation: str) -> Any:
    """Keep the aspect: the side that is short for the wanted size gets it, the other one follows (rounded down)."""
    from PIL import Image

    kinds = {"bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}
    kind = kinds.get(interpolation, Image.Resampling.BILINEAR)
    if image.width * height <= image.height * width:
        size = (width, int(width * image.height / image.width))
    else:
        size = (int(height * image.width / image.height), height)
    return image if size == image.size else image.resize(size, kind)
