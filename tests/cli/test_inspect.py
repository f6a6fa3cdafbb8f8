"""``fxcompress inspect``: what each pass could touch, and why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxcompress.analysis import count_macs
from fxcompress.capture import capture
from fxcompress.modelspec import resolve

Run = Callable[..., tuple[int, str, str]]
Replace = Callable[[Callable[..., Any] | BaseException], None]


def test_inspect_says_what_each_pass_could_touch(run: Run, model: str) -> None:
    code, out, _ = run("inspect", model, "--target", "torch", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["target"] == "torch"
    rows = {row["name"]: row for row in facts["layers"]}
    assert rows["stem"]["fold"] == "yes: norm" and rows["norm"]["fold"] == "yes"
    assert rows["stem"]["fuse"] == "yes: relu" and rows["branch"]["fuse"] == "yes: add + relu"
    assert rows["stem"]["quantize"] == rows["branch"]["quantize"] == "yes"
    assert rows["last"]["fold"] == rows["last"]["quantize"] == ""
    assert rows["branch"]["macs"] == facts["batch"] * 16 * 16 * 9 * 64
    program = capture(resolve(model).require_module(), resolve(model).args)
    assert facts["macs"] == count_macs(program) == sum(row["macs"] for row in facts["layers"])
    assert facts["parameters"] == sum(row["parameters"] for row in facts["layers"])
    assert facts["inputs"] == {"x": {"dtype": "float32", "shape": ["batch", 3, 16, 16]}}


def test_inspect_gives_the_reasons(run: Run, model: str, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text("""
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.shared = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.alone = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        x = torch.relu(self.alone(x + self.norm(y) + y))
        return torch.relu(self.shared(torch.relu(self.shared(x))))

def build():
    return Odd(), torch.randn(2, 3, 8, 8)
""")
    code, out, _ = run("inspect", "py:odd.py:build", "--json")
    rows = {row["name"]: row for row in json.loads(out)["layers"]}
    assert code == 0
    assert "more than one user" in rows["norm"]["fold"] and rows["norm"]["fold"].startswith("no: ")
    assert rows["alone"]["fold"] == "no: no layer next to it to fold into"
    assert rows["shared"]["fuse"].startswith("no: ")


def test_inspect_table(run: Run, model: str) -> None:
    code, out, _ = run("inspect", model, "--target", "torch")
    assert code == 0
    for word in (
        "stem",
        "Conv2d",
        "yes: add + relu",
        "MACs",
        "parameters",
        "QuantizeStatic",
        "input x: float32[batch, 3, 16, 16]",
    ):
        assert word in out


def test_inspect_without_example(run: Run, model: str) -> None:
    code, _, err = run("inspect", "py:net.py:bare")
    assert code == 2 and "--input-shape" in err
    code, out, _ = run("inspect", "py:net.py:bare", "--input-shape", "1,3,32,32", "--json")
    assert code == 0 and next(r for r in json.loads(out)["layers"] if r["name"] == "stem")["shape"][-1] == 16
