"""Progress on a pipe: a line now and then, with the time left."""

from __future__ import annotations

import pytest

from fxcompress import progress


def test_a_pipe_gets_lines_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar("rounded", 100, True, "8 layers") as advance:
        for _ in range(100):
            now[0] += 10.0
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["8 layers", "rounded 3/100, 0:16:10 left"]
    assert len(lines) == 1 + 33 and lines[-1] == "rounded 99/100, 0:00:10 left"


def test_many_steps_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar("observed", 64, True) as advance:
        now[0] = 40.0
        advance(16)
    assert capsys.readouterr().err == "observed 16/64, 0:02:00 left\n"


def test_quick_work_and_hidden_progress_say_no_more_than_the_header(capsys: pytest.CaptureFixture[str]) -> None:
    for shown, wanted in ((True, "2 layers\n"), (False, "")):
        with progress.progress_bar("rounded", 2, shown, "2 layers") as advance:
            advance()
            advance()
        assert capsys.readouterr().err == wanted
