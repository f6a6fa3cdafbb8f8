"""``fxcompress compress --dry-run``: the plan, the recipe and the estimate; options that contradict."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.cli.plan import peak_activations

Run = Callable[..., tuple[int, str, str]]
Replace = Callable[[Callable[..., Any] | BaseException], None]


def test_dry_run_builds_and_writes_nothing(
    run: Run, model: str, data: str, tmp_path: Path, replace_compile: Replace
) -> None:
    replace_compile(AssertionError("must not be called"))
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run("compress", model, "-o", "out", "--data", data, "--dry-run", "--dump", "dump", "--json")
    facts = json.loads(out)
    assert code == 0
    assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before
    steps = {step["name"]: step for step in facts["steps"]}
    assert any("norm" in change for change in steps["FoldBatchNorm"]["changes"])
    assert {"quantize stem", "quantize branch"} <= set(steps["QuantizeStatic"]["changes"])
    assert facts["speed_gate"] and facts["recipe"][-1]["calibrator"] == "mse"
    assert 0 < facts["estimate"]["engine_file"] < facts["estimate"]["float_file"] < facts["estimate"]["memory"]


def test_dry_run_recipe_can_be_run_again(run: Run, model: str, data: str) -> None:
    options = ("compress", model, "--data", data, "--dry-run", "--json")
    first = json.loads(run(*options, "--calibrator", "entropy", "--ignore", "head*", "--samples", "20")[1])
    quantization = first["recipe"][-1]
    assert (quantization["calibrator"], quantization["ignore"], quantization["samples"]) == ("entropy", ["head*"], 20)
    assert first["speed_gate"], "other settings of the usual passes keep the gate"
    Path("recipe.json").write_text(json.dumps(first["recipe"]))
    again = json.loads(run(*options, "--passes", "recipe.json")[1])
    assert again["recipe"] == first["recipe"] and again["steps"] == first["steps"]
    assert not again["speed_gate"], "passes by name are obeyed"


def test_dry_run_without_data(run: Run, model: str) -> None:
    code, out, err = run("compress", model, "--dry-run")
    assert code == 0 and "float32" in err and "QuantizeStatic" not in out
    assert "memory" in out and "disk" in out and "recipe" in out


def test_passes_by_name(run: Run, model: str, data: str) -> None:
    options = ("compress", model, "--dry-run", "--json", "--data", data)
    recipe = json.loads(run(*options, "--passes", "fold-batch-norm, QuantizeStatic", "--calibrator", "minmax")[1])[
        "recipe"
    ]
    assert [entry["name"] for entry in recipe] == ["FoldBatchNorm", "QuantizeStatic"]
    assert recipe[1]["calibrator"] == "minmax"
    code, _, err = run(*options, "--passes", "FoldBatchNrm")
    assert code == 2 and "did you mean FoldBatchNorm?" in err
    Path("bad.json").write_text("[1]")
    assert run(*options, "--passes", "bad.json")[0] == 2
    assert run(*options, "--passes", "nowhere.json")[0] == 2
    assert run(*options, "--calibrator", "nonsense")[0] == 2


def test_options_that_contradict(run: Run, model: str, data: str) -> None:
    assert run("compress", model, "-o", "out", "--data", data, "--random-data")[0] == 2
    code, _, err = run("compress", model, "-o", "out", "--passes", "QuantizeStatic")
    assert code == 2 and "--data" in err
    code, _, err = run("compress", model, "-o", "out", "--max-drop", "0.1")
    assert code == 2 and "labelled data" in err
    assert run("compress", model, "-o", "out", "--data", data, "--mean", "a,b,c")[0] == 2
    assert run("compress", model, "-o", "out", "--data", data, "--std", "0")[0] == 2
    assert run("compress", model, "-o", "out", "--target", "nonsense")[0] == 2


def test_peak_activations_by_hand() -> None:
    """x, y and their sum are alive together; the view of x costs nothing and keeps x alive."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(x)
            z = torch.relu(y)
            return z + x.view(-1, 2, 4).reshape(-1, 8)

    program = capture(Net(), (torch.randn(4, 8),))
    size = 4 * 8 * 4
    assert peak_activations(program) == 3 * size
    assert peak_activations(capture(nn.Sequential(*[nn.ReLU()] * 9), (torch.randn(4, 8),))) == 2 * size
