"""The README's code runs as it stands there: every Python block in order, then every ``$ fxcompress`` line."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


@dataclass(frozen=True)
class Block:
    """One fenced block: its info string, its text and the number of its first line."""

    info: str
    text: str
    line: int


def blocks(markdown: str) -> list[Block]:
    """All fenced blocks of ``markdown``, in order."""
    found = re.finditer(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", markdown, flags=re.MULTILINE | re.DOTALL)
    return [Block(m[1].strip(), m[2], markdown.count("\n", 0, m.start(2)) + 1) for m in found]


def commands(found: list[Block]) -> list[str]:
    """The ``$ fxcompress ...`` lines of the console blocks; a line that ends in a backslash goes on in the next."""
    text = "\n".join(block.text for block in found if block.info in ("console", "shell", "sh", "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ fxcompress")]


def run_command(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one ``fxcompress ...`` line with this interpreter, in ``folder``, without a shell."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from fxcompress.cli import main; sys.exit(main())"
    arguments = shlex.split(command, comments=True)[1:]
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def test_parser_sees_blocks_lines_and_commands() -> None:
    """Guards the tests below: a parser that finds nothing would pass them."""
    text = "a\n```python\nx = 1\ny = 2\n```\n\n```console\n$ fxcompress env \\\n  --json  # all\nout\n$ make\n```\n"
    first, second = blocks(text)
    assert (first.info, first.text, first.line) == ("python", "x = 1\ny = 2\n", 3)
    assert commands([first, second]) == ["fxcompress env    --json  # all"]


def test_length() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_every_python_block_is_one_that_runs() -> None:
    """No block may opt out of being run: the info string of Python code is ``python`` and nothing else."""
    infos = {block.info for block in blocks(README.read_text())}
    odd = {info for info in infos if re.match(r"(py|python)\b", info) and info != "python"} | (infos & {""})
    assert not odd, f"name the language, and only the language: {sorted(odd)}"


@pytest.mark.slow
@pytest.mark.onnxruntime
@pytest.mark.openvino
def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python blocks in one namespace, then the commands, which may use the files that the blocks wrote."""
    found = blocks(README.read_text())
    python = [block for block in found if block.info == "python"]
    assert python, "the README shows no Python"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in python:
        padded = "\n" * (block.line - 1) + block.text  # a traceback then names the README's own line
        exec(compile(padded, str(README), "exec"), namespace)
    lines = commands(found)
    assert lines, "the README shows no fxcompress command"
    for command in lines:
        done = run_command(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
