"""Image preprocessing against torchvision's own transforms."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from fxcompress.errors import CalibrationError
from fxcompress.preprocess import IMAGENET, Preprocessing, image_tensor

Image = pytest.importorskip("PIL.Image")


def picture(width: int, height: int, mode: str = "RGB") -> "Image.Image":
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, shape, dtype=np.uint8))


def reference(image: "Image.Image", size: int, how: Preprocessing) -> torch.Tensor:
    """What torchvision does: Resize to size / crop, CenterCrop, ToTensor, Normalize."""
    import torchvision.transforms as t

    kinds = {"bilinear": t.InterpolationMode.BILINEAR, "bicubic": t.InterpolationMode.BICUBIC}
    steps = [t.Resize(round(size / how.crop), kinds[how.interpolation]), t.CenterCrop(size), t.ToTensor()]
    result: torch.Tensor = t.Compose([*steps, t.Normalize(how.mean, how.std)])(image)
    return result


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (64, 64), (37, 480)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_same_as_torchvision(size: tuple[int, int], interpolation: str, crop: float, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    how = Preprocessing(crop=crop, interpolation=interpolation)
    file = tmp_path / "image.png"
    picture(*size).save(file)
    got = image_tensor(file, (3, 64, 64), how)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got, reference(Image.open(file), 64, how), rtol=1e-5, atol=1e-5)


def test_sources_agree(tmp_path: Path) -> None:
    image = picture(80, 70)
    stream = io.BytesIO()
    image.save(stream, "png")
    from_array = image_tensor(np.asarray(image), (3, 32, 32), IMAGENET)
    assert torch.equal(from_array, image_tensor(stream.getvalue(), (3, 32, 32), IMAGENET))


def test_gray_input_gets_the_mean_statistics() -> None:
    got = image_tensor(
        np.asarray(picture(32, 32)), (1, 32, 32), Preprocessing((0.1, 0.2, 0.6), (0.2, 0.4, 0.9), crop=1.0)
    )
    gray = torch.from_numpy(np.asarray(picture(32, 32).convert("L")).astype(np.float64)) / 255
    torch.testing.assert_close(got[0].double(), (gray - 0.3) / 0.5, rtol=1e-5, atol=1e-5)
    one = image_tensor(np.asarray(picture(32, 32, "L"))[..., None], (3, 32, 32), Preprocessing(crop=1.0))
    assert one.shape == (3, 32, 32)


def test_not_square() -> None:
    assert image_tensor(np.asarray(picture(90, 40)), (3, 48, 32), IMAGENET).shape == (3, 48, 32)


def test_unreadable_image(tmp_path: Path) -> None:
    file = tmp_path / "broken.jpg"
    file.write_bytes(b"\xff\xd8nonsense")
    with pytest.raises(CalibrationError, match=r"broken\.jpg cannot be read"):
        image_tensor(file, (3, 8, 8), IMAGENET)
    picture(64, 64).save(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CalibrationError, match=r"broken\.jpg cannot be read"):
        image_tensor(file, (3, 8, 8), IMAGENET)
