"""``--data``: folders and .npz files as batches, labels, and what is wrong with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.cli.datafiles import InputFacts, logits_of, open_data, random_batches, top1
from fxcompress.data import CalibrationData
from fxcompress.errors import CalibrationError, UsageError
from fxcompress.preprocess import IMAGENET, Preprocessing, image_tensor

FACTS = InputFacts(names=("x",), image=(3, 16, 16), classes=4, preprocessing=IMAGENET)


def read(path: Path, facts: InputFacts = FACTS, **options: int) -> Any:
    return open_data(path, facts, **({"samples": 4, "batch": 3, "seed": 0} | options))


def write_images(folder: Path, classes: dict[str, int]) -> None:
    Image = pytest.importorskip("PIL.Image")
    value = 0
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            value += 7
            Image.fromarray(np.full((20, 24, 3), value % 256, np.uint8)).save(folder / name / f"{i}.png")


def write_arrays(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


# ------------------------------------------------------------------------------------------------------------ images
def test_folder_without_labels(tmp_path: Path) -> None:
    write_images(tmp_path, {".": 5})
    found = read(tmp_path)
    batches = list(found.calibration)
    assert [b.shape for b in batches] == [(3, 3, 16, 16), (1, 3, 16, 16)] and len(found.calibration) == 2
    assert found.scoring is None and found.example().shape == (1, 3, 16, 16)
    assert [torch.equal(a, b) for a, b in zip(batches, found.calibration, strict=True)] == [True, True], "again"


def test_whole_batches(tmp_path: Path) -> None:
    """For a model that takes one batch size only."""
    found = read(write_arrays(tmp_path / "d.npz", x=np.zeros((11, 2)), y=np.zeros(11)), samples=5, batch=2, whole=True)
    assert [len(b["x"]) for b in found.calibration] == [2, 2] and len(found.calibration) == 2
    assert [len(y) for _, y in found.scoring] == [2, 2, 2]


def test_sample_is_chosen_by_seed_and_covers_classes(tmp_path: Path) -> None:
    """A folder is sorted by class: the first samples would all be of one."""
    write_images(tmp_path, {"0": 8, "1": 8, "2": 8, "3": 8})
    chosen = read(tmp_path, samples=12).calibration
    assert len({chosen.source.labels[i] for i in chosen.indices}) == 4
    assert chosen.indices == read(tmp_path, samples=12).calibration.indices
    assert chosen.indices != read(tmp_path, samples=12, seed=1).calibration.indices


def test_labels_by_number_by_order_and_not_at_all(tmp_path: Path) -> None:
    write_images(tmp_path / "numbers", {"10": 1, "2": 2})
    assert read(tmp_path / "numbers").scoring.source.labels == [10, 2, 2]
    write_images(tmp_path / "names", {"ant": 1, "bee": 1, "cat": 1, "dog": 1})
    assert read(tmp_path / "names").scoring.source.labels == [0, 1, 2, 3]
    write_images(tmp_path / "few", {"ant": 1, "bee": 1})
    few = read(tmp_path / "few")
    assert few.scoring is None and any("2 class folders, but the model has 4 outputs" in n for n in few.notes)


def test_scoring_is_held_out_when_there_is_enough(tmp_path: Path) -> None:
    write_images(tmp_path, {"0": 5, "1": 5})
    found = read(tmp_path, samples=4)
    assert set(found.scoring.indices).isdisjoint(found.calibration.indices)
    assert len(found.scoring.indices) == 6
    assert any("the other 6 samples" in note for note in found.notes)
    tight = read(tmp_path, samples=6)
    assert len(tight.scoring.indices) == 10 and any("those of calibration too" in note for note in tight.notes)


def test_folder_failures(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no image"):
        read(tmp_path)
    write_images(tmp_path, {".": 1})
    with pytest.raises(UsageError, match="--input-shape"):
        read(tmp_path, InputFacts(("x",), None, None, IMAGENET))
    with pytest.raises(UsageError, match="there is no"):
        read(tmp_path / "nowhere")
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UsageError, match="neither a folder nor"):
        read(tmp_path / "text.txt")


# -------------------------------------------------------------------------------------------------------------- .npz
def test_arrays_with_labels(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(10, 5)), np.arange(10, dtype=np.int32)
    found = read(write_arrays(tmp_path / "d.npz", x=x, y=y))
    first = next(iter(found.calibration))
    rows = list(found.calibration.indices[:3])
    assert isinstance(first, dict) and first["x"].dtype == torch.float32
    assert np.array_equal(first["x"].numpy(), x[rows].astype(np.float32))
    inputs, labels = next(iter(found.scoring))
    assert labels.dtype == torch.int64 and torch.equal(labels, torch.tensor(found.scoring.indices[:3]))
    assert np.array_equal(inputs["x"].numpy(), x[labels.numpy()].astype(np.float32))


def test_arrays_by_name_and_by_place(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.int32).reshape(6, 2)
    facts = InputFacts(("input_ids", "attention_mask"), None, None, IMAGENET)
    pair = write_arrays(tmp_path / "pair.npz", input_ids=ids, attention_mask=np.ones_like(ids), labels=np.zeros(6))
    batch = next(iter(read(pair, facts).calibration))
    assert set(batch) == {"input_ids", "attention_mask"} and batch["input_ids"].dtype == torch.int64
    other = write_arrays(tmp_path / "other.npz", anything=np.zeros((6, 2), np.float32))
    assert isinstance(next(iter(read(other).calibration)), Tensor), "a single array needs no name"
    extra = write_arrays(tmp_path / "extra.npz", images=np.zeros((6, 2), np.float32), ids=np.zeros(6))
    facts = InputFacts(("pixel_values",), None, None, IMAGENET)
    found = read(extra, facts)
    assert isinstance(next(iter(found.calibration)), Tensor) and any("only images is used" in n for n in found.notes)


def test_pixels_are_preprocessed(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
    how = Preprocessing((0.5,) * 3, (0.5,) * 3, crop=0.8)
    facts = InputFacts(("x",), (3, 16, 16), None, how)
    last = read(write_arrays(tmp_path / "last.npz", x=pixels), facts)
    first = read(write_arrays(tmp_path / "first.npz", x=pixels.transpose(0, 3, 1, 2)), facts)
    batch = next(iter(last.calibration))
    assert torch.equal(batch, next(iter(first.calibration)))
    assert torch.equal(batch[0], image_tensor(pixels[last.calibration.indices[0]], (3, 16, 16), how))


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x": np.zeros((0, 5))}, "holds no samples"),
        ({"y": np.zeros(3)}, "holds no samples"),
        ({"x": np.float32(1)}, "holds no samples"),
        ({"x": np.zeros((4, 5)), "y": np.zeros(3)}, "differ in length"),
        ({"x": np.array([{"a": 1}], dtype=object)}, "cannot be read"),
        ({"x": np.zeros((4, 9, 9, 5), np.uint8)}, "neither 1 nor 3 channels"),
    ],
)
def test_bad_arrays(arrays: dict[str, np.ndarray], text: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=text):
        read(write_arrays(tmp_path / "d.npz", **arrays))


def test_arrays_that_fit_no_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name them after the inputs: x"):
        read(write_arrays(tmp_path / "d.npz", a=np.zeros((4, 5)), b=np.zeros((4, 5))))
    (tmp_path / "broken.npz").write_bytes(b"nonsense")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read(tmp_path / "broken.npz")


# ------------------------------------------------------------------------------------------------- scores and noise
def test_top1_counts(tmp_path: Path) -> None:
    x = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1]]
    found = read(write_arrays(tmp_path / "d.npz", x=x, y=np.array([0, 1, 2, 3, 3, 3])), samples=6)
    assert top1(found.scoring)(lambda x: x) == pytest.approx(4 / 6)
    assert top1(found.scoring)(lambda x: {"logits": -x}) < 0.5


def test_logits_of_structures() -> None:
    x = torch.randn(2, 3)
    assert logits_of(x) is x and logits_of((x, 1)) is x and logits_of({"a": x}) is x
    assert logits_of({"loss": 1, "logits": x}) is x
    for nothing in (None, (), {}, torch.tensor(1.0), "text"):
        with pytest.raises(UsageError, match="no class scores"):
            logits_of(nothing)


def test_random_data_fits_the_program() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y: Tensor = self.layer(x) + self.table(ids)
            return y

    args = (torch.randn(1, 4), torch.tensor([8]))
    program = capture(Two(), args)
    data = random_batches(args, {}, samples=5, batch=2)
    calls = list(CalibrationData(data.calibration).calls(program))
    assert [len(a[0]) for a, _ in calls] == [2, 2, 1]
    assert not torch.equal(calls[0][0][0], calls[1][0][0]) and calls[0][0][1].tolist() == [8, 8]
    assert any("means nothing" in note for note in data.notes)
