"""What a sensitivity analysis recommends, and how it is shown."""

from __future__ import annotations

import csv
import math
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fxcompress.errors import ArtifactError, MissingRuntimeError, UsageError
from fxcompress.prune.sensitivity import Curve, Point, Sensitivity


# ------------------------------------------------------------------------------------------------ recommendations
def made(curves: dict[str, tuple[int, list[tuple[int, float, int]]]], baseline: float = 1.0) -> Sensitivity:
    """Curves of ``(removed, metric, parameters saved)`` by name and size, of 1000 parameters and 1000 MACs."""
    groups = [
        Curve(
            name, (name,), size, tuple(Point(r / size, r, m, 1000 - saved, 1000 - 2 * saved) for r, m, saved in points)
        )
        for name, (size, points) in curves.items()
    ]
    return Sensitivity(baseline, 1000, 1000, (0.5,), tuple(groups), "l2")


def test_recommended_ratio_is_where_the_line_crosses() -> None:
    s = made({"x": (100, [(20, 0.98, 20), (40, 0.90, 40)])})
    for max_drop in (0.0, 0.01, 0.02, 0.05, 0.1, 0.5):
        # reference: walk unit by unit along the two straight pieces
        drops = [0.02 * u / 20 if u <= 20 else 0.02 + 0.08 * (u - 20) / 20 for u in range(41)]
        expected = max(u for u in range(41) if drops[u] <= max_drop + 1e-12) / 100
        assert s.recommend(max_drop) == {"x": pytest.approx(expected)}
        assert s.predicted_drop(s.recommend(max_drop)) <= max_drop + 1e-9


def test_a_dip_is_not_jumped_over() -> None:
    """A curve that falls and comes back (noise) gives the first crossing, and a rise above the baseline is no drop."""
    s = made({"x": (10, [(2, 0.8, 1), (4, 1.0, 2)]), "y": (10, [(2, 1.1, 1), (4, 0.9, 2)])})
    assert s.recommend(0.05) == {"x": 0.0, "y": 0.3}
    assert s.recommend(0.1) == {"x": 0.1, "y": 0.4}


def test_fractions_of_units_are_never_promised() -> None:
    s = made({"x": (3, [(1, 0.9, 1), (2, 0.8, 2)])})
    assert s.recommend(0.15) == {"x": pytest.approx(1 / 3)} and s.recommend(0.2) == {"x": pytest.approx(2 / 3)}


def brute_force(s: Sensitivity, max_drop: float, by: str) -> float:
    """The most that any choice of measured points saves."""
    best = {0.0: 0.0}
    for curve in s.groups:
        steps = [(0.0, 0)] + [(s.baseline - p.metric, getattr(s, by) - getattr(p, by)) for p in curve.points]
        best = {d + e: max(v + g, best.get(d + e, 0)) for d, v in best.items() for e, g in steps if d + e <= max_drop}
    return max(best.values())


@pytest.mark.parametrize("by", ["parameters", "macs"])
def test_joint_recommendation_fills_the_target(by: str) -> None:
    cheap, dear = (10, [(2, 0.999, 50), (4, 0.99, 100), (6, 0.95, 150)]), (10, [(2, 0.95, 60), (4, 0.8, 120)])
    late = (10, [(2, 0.98, 5), (4, 0.979, 200)])  # little at first, much for a little more
    s = made({"cheap": cheap, "dear": dear, "late": late})
    for max_drop in (0.0005, 0.01, 0.03, 0.05, 0.1, 0.5):
        found = s.recommend(max_drop, joint=True, by=by)
        assert s.predicted_drop(found) <= max_drop + 1e-9
        saved = sum(getattr(s, by) - getattr(p, by) for c in s.groups for p in c.points if p.ratio == found[c.name])
        assert saved >= 0.8 * brute_force(s, max_drop, by)
    assert s.recommend(0.0005, joint=True) == {"cheap": 0.0, "dear": 0.0, "late": 0.0}
    assert s.recommend(0.04, joint=True) == {"cheap": 0.4, "dear": 0.0, "late": 0.4}
    assert s.recommend(9.0, joint=True) == {"cheap": 0.6, "dear": 0.4, "late": 0.4}


@pytest.mark.parametrize(("options", "message"), [({"max_drop": -1}, "max_drop"), ({"max_drop": math.nan}, "max_drop")])
def test_wrong_targets(options: dict[str, Any], message: str) -> None:
    s = made({"x": (10, [(2, 0.8, 1)])})
    with pytest.raises(UsageError, match=message):
        s.recommend(**options)
    with pytest.raises(UsageError, match="'size'"):
        s.recommend(0.1, by="size")


# ------------------------------------------------------------------------------------------------ reports
NAMES = {'<b>&"x"': (10, [(2, 0.8, 1), (4, 0.7, 2)]), "_layer.$1$": (4, [(1, 0.95, 5), (2, 0.9, 7)])}


def test_table() -> None:
    lines = str(made(NAMES)).splitlines()
    assert lines[1].split() == ["group", "units", "50%"] and "1.0000 as it is" in lines[0]
    assert lines[2].split() == ['<b>&"x"', "10", "0.8000", "0.7000"] and len({len(x) for x in lines[2:]}) == 1


def test_json_round_trip(tmp_path: Path) -> None:
    s = made(NAMES)
    assert Sensitivity.from_json(s.to_json(tmp_path / "new" / "s.json")) == s
    for content in ("{", '{"format": "x"}', "[]", '{"format": "fxcompress sensitivity", "schema": 1, "groups": [1]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ArtifactError, match="cannot be read"):
            Sensitivity.from_json(tmp_path / "bad.json")


def test_csv(tmp_path: Path) -> None:
    with open(made(NAMES).to_csv(tmp_path / "s.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["group"] for r in rows] == ['<b>&"x"'] * 2 + ["_layer.$1$"] * 2
    assert float(rows[1]["drop"]) == pytest.approx(0.3) and int(rows[3]["parameters"]) == 993


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_page(tmp_path: Path) -> None:
    text = made(NAMES).to_html(tmp_path / "s.html").read_text()
    page = Page()
    page.feed(text)
    assert '<b>&"x"' in page.texts and "_layer.$1$" in page.texts, "names are text, not markup"
    assert not [t for t, _ in page.tags if t in ("b", "script", "link", "img")] and "http" not in text
    lines = [a["points"] for t, a in page.tags if t == "polyline"]
    assert lines[0].split() == ["4.0,4.0", "38.4,30.7", "72.8,44.0"], (
        "0 %, 20 % and 40 % at 1.0, 0.8 and 0.7 of 0.7..1.0"
    )
    assert all(ET.fromstring(svg) is not None for svg in re.findall(r"<svg.*?</svg>", text))


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_plot(tmp_path: Path, kind: str) -> None:
    many = {f"g{i}": (10, [(2, 1 - i / 1000, 1)]) for i in range(20)}
    path = made(NAMES | many).plot(tmp_path / "plots" / f"s.{kind}")
    content = path.read_bytes()
    if kind == "png":
        assert content.startswith(b"\x89PNG")
    else:
        root = ET.fromstring(content)
        assert root.tag.endswith("svg") and b"12 more, which lose less" in content and b"_layer.$1$" in content
        assert made(NAMES | many).plot(tmp_path / "again.svg").read_bytes() == content


def test_plot_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        made(NAMES).plot(tmp_path / "s.pdf")


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingRuntimeError, match=r"pip install \"fxcompress\[plot\]\""):
        made(NAMES).plot(tmp_path / "s.svg")
