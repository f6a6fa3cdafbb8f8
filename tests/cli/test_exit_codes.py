"""Start, help, exit codes, and what goes to stdout and stderr."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxcompress.cli import main
from fxcompress.errors import GateError

Run = Callable[..., tuple[int, str, str]]
Replace = Callable[[Callable[..., Any] | BaseException], None]


ROOT = Path(__file__).resolve().parents[2]


class FakeEngine:
    """What ``compile`` hands over, as far as the command line looks at it."""

    def __init__(self) -> None:
        self.report = SimpleNamespace(to_dict=lambda: {"precision": "int8", "speed": float("nan")})

    def save(self, folder: Path) -> Path:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "manifest.json").write_text("{}")
        return Path(folder)


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["--version"], ["compress", "--nonsense"]])
def test_parsing_does_not_import_torch(arguments: list[str]) -> None:
    """Help is there in a fraction of a second because nothing heavy is imported for it."""
    code = (
        "import sys; from fxcompress.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'onnx', 'openvino', 'timm', 'transformers'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_help_names_the_commands_and_warns_of_code(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and all(command in out for command in ("compress", "inspect", "benchmark", "env"))
    code, out, _ = run("compress", "--help")
    assert "runs that file" in " ".join(out.split()), "that py: executes code is said"


def test_usage_errors_of_the_parser(run: Run) -> None:
    for arguments in (["nonsense"], ["compress"], ["compress", "x", "--samples", "0"], ["env", "--nonsense"], []):
        code, out, err = run(*arguments)
        assert code == 2 and (not out or not arguments)
        assert "Traceback" not in err


def test_env(run: Run) -> None:
    code, out, _ = run("env", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["packages"]["torch"] == torch.__version__
    code, out, _ = run("env")
    assert code == 0 and torch.__version__ in out and "processor" in out


def test_env_names_the_pip_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxcompress import environment

    monkeypatch.setattr(environment, "installed", lambda package: package != "openvino")
    assert 'pip install "fxcompress[openvino]"' in run("env")[1]


def test_unknown_model(run: Run) -> None:
    code, out, err = run("inspect", "resnet18")
    assert code == 2 and not out
    assert "FXC-MODEL-001" in err and "did you mean timm:resnet18?" in err


def test_unsupported_model(run: Run, model: str) -> None:
    code, out, err = run("compress", "py:net.py:branching", "-o", "out", "--target", "torch")
    assert code == 3 and not out and not Path("out").exists()
    line = Path("net.py").read_text().splitlines().index("        return x + 1 if x.sum() > 0 else x - 1") + 1
    assert f"net.py:{line}" in err and "Traceback" not in err


def test_missed_gate_keeps_what_was_built(run: Run, model: str, data: str, replace_compile: Replace) -> None:
    error = GateError(1, "accuracy fell from 0.9000 to 0.1000", why="max_drop is 0.01")
    error.engine = FakeEngine()
    replace_compile(error)
    code, out, err = run("compress", model, "-o", "out", "--data", data, "--json")
    assert code == 4 and not Path("out").exists() and Path("out.rejected/manifest.json").exists()
    facts = json.loads(out)
    assert facts["exit_code"] == 4 and facts["error"]["id"] == "FXC-GATE-001"
    assert "accuracy fell" in err and "out.rejected" in err


def test_resources(run: Run, model: str, replace_compile: Replace) -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), MemoryError()):
        replace_compile(error)
        code, _, err = run("compress", model, "-o", "out")
        assert code == 5 and "Traceback" not in err


def test_out_folder_is_checked_before_the_work(run: Run, model: str, replace_compile: Replace) -> None:
    replace_compile(AssertionError("must not get here"))
    Path("taken").write_text("x")
    Path("full").mkdir()
    Path("full/precious.txt").write_text("x")
    for out in ("taken", "taken/below", "full"):
        code, _, err = run("compress", model, "-o", out)
        assert code == 5 and "FXC-ARTIFACT" in err
    assert Path("full/precious.txt").read_text() == "x"
    assert run("compress", model)[0] == 2, "no folder at all"


def test_cancelled(run: Run, model: str, replace_compile: Replace) -> None:
    replace_compile(KeyboardInterrupt())
    code, out, err = run("compress", model, "-o", "out")
    assert code == 130 and not out and "Traceback" not in err


def test_interrupt(model: str, tmp_path: Path) -> None:
    """Control-C in the middle of the work: 130, no traceback, nothing half-written."""
    work = "    open('begun', 'w').close()\n    time.sleep(60)\n"
    (tmp_path / "slow.py").write_text(f"import time\ndef build():\n{work}")
    # A shell that starts the tests in the background hands down a SIGINT that is ignored.
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{start}; from fxcompress.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "compress", "py:slow.py:build", "-o", "out"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=env, **pipes) as process:
        assert process.stderr is not None and "loading" in process.stderr.readline()
        while not (tmp_path / "begun").exists() and process.poll() is None:  # not in the middle of an import
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_internal_errors_show_their_traceback_unless_quiet(run: Run, model: str, replace_compile: Replace) -> None:
    replace_compile(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        main(["compress", model, "-o", "out"])
    code, out, err = run("compress", model, "-o", "out", "--quiet", "--json")
    assert code == 1 and "ZeroDivisionError: a bug" in err and "Traceback" not in err
    assert json.loads(out)["error"]["what"] == "ZeroDivisionError: a bug"


def test_quiet_and_json_of_an_earlier_command_are_forgotten(run: Run, model: str) -> None:
    assert run("inspect", "nonsense", "--quiet", "--json")[1]
    code, out, err = run("inspect", "nonsense")
    assert code == 2 and not out and "FXC-MODEL-001" in err


def test_pipes_get_plain_lines(model: str, tmp_path: Path) -> None:
    """No colours, no spinner, JSON alone on stdout; NO_COLOR wins over a forced terminal."""
    code = "import sys; from fxcompress.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "inspect", model]
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "Net"
    assert "\x1b" not in done.stderr and "capturing Net" in done.stderr
    env |= {"FORCE_COLOR": "1", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and not any(f"\x1b[{c}m" in done.stdout for c in range(30, 50))


def test_json_of_success_is_all_of_stdout(run: Run, model: str, replace_compile: Replace) -> None:
    replace_compile(lambda *a, **k: FakeEngine())
    code, out, _ = run("compress", model, "-o", "out", "--json")
    facts = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert code == 0 and facts["report"] == {"precision": "int8", "speed": None}
    assert facts["next"] == f"fxcompress benchmark {facts['out']}"
