"""Values through JSON and safetensors and back; folders that stay whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress import checkpoint
from fxcompress.errors import ArtifactError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
KEYS = st.integers() | st.text(max_size=5) | st.tuples(st.integers(), st.booleans())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@given(VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(checkpoint.pack(value, tensors), allow_nan=False)
    back = checkpoint.unpack(json.loads(text), tensors)
    assert back == value and repr(back) == repr(value), "1 and True, or a list and a tuple, are not the same"


def test_nan_comes_back() -> None:
    back = checkpoint.unpack(checkpoint.pack([math.nan, math.inf, -math.inf], {}), {})
    assert math.isnan(back[0]) and back[1:] == [math.inf, -math.inf]


def test_tensors_come_back_bit_by_bit(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {f"t{i}": (torch.randn(3, 4) * 50).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(3.5), "turned": torch.randn(3, 4).t(), "empty": torch.zeros(0, 2)}
    shared = torch.randn(5)
    state = {"nested": [{0: tensors["t0"], "again": (shared, shared)}], 7: torch.tensor(True)}
    weights = {**tensors, "tied": shared, "tied.too": shared}
    checkpoint.write(tmp_path / "c", state, weights, {"w": shared})
    found, again, best = checkpoint.read(tmp_path / "c")
    assert again.keys() == weights.keys() and best is not None and torch.equal(best["w"], shared)
    for name, value in weights.items():
        assert again[name].dtype == value.dtype and torch.equal(again[name], value), name
    assert torch.equal(found["nested"][0][0], tensors["t0"]) and found[7].dtype == torch.bool
    assert torch.equal(found["nested"][0]["again"][1], shared)


def test_names_that_look_alike_do_not_collide(tmp_path: Path) -> None:
    state = {"a": {"b": torch.tensor(1.0)}, "a.b": torch.tensor(2.0), 0: [torch.tensor(3.0)], "0": [torch.tensor(4.0)]}
    checkpoint.write(tmp_path / "c", state, {}, None)
    found, _, _ = checkpoint.read(tmp_path / "c")
    assert [found["a"]["b"].item(), found["a.b"].item(), found[0][0].item(), found["0"][0].item()] == [1, 2, 3, 4]


def test_what_cannot_be_written_is_named_and_nothing_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    checkpoint.write(folder, {"n": 1}, {}, None)
    with pytest.raises(ArtifactError, match=r"FXC-ARTIFACT-300 a function cannot .*\n.*state\.callbacks\.0"):
        checkpoint.write(folder, {"callbacks": [test_nan_comes_back]}, {}, None)
    assert checkpoint.read(folder)[0] == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_missing_and_damaged(tmp_path: Path) -> None:
    assert not checkpoint.exists(tmp_path)
    with pytest.raises(ArtifactError, match="there is no saved checkpoint"):
        checkpoint.read(tmp_path)
    folder = tmp_path / "c"
    checkpoint.write(folder, {"n": 1}, {}, None)
    assert checkpoint.exists(folder)
    (folder / "state.json").write_text('{"dict": []}')
    with pytest.raises(ArtifactError, match=r"state\.json"):
        checkpoint.read(folder)


def test_loader_with_other_generators() -> None:
    plain = [1, 2]
    loader = torch.utils.data.DataLoader(plain, generator=torch.Generator())  # type: ignore[arg-type,var-annotated]
    state = checkpoint.random_state(loader)
    assert len(state["loader"]) == 1, "a generator that loader and sampler share counts once"
    with pytest.raises(ArtifactError, match="FXC-ARTIFACT-302"):
        checkpoint.restore_random_state(state, plain)
