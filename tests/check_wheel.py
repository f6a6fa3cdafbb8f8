"""Import the installed wheel from outside the checkout (``make wheel``): ``python tests/check_wheel.py FOLDER``."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PROBE = """
import importlib, pathlib, sys
site, *names = sys.argv[1:]
for name in names:
    module = importlib.import_module(name)
    if not pathlib.Path(module.__file__).is_relative_to(site):
        sys.exit(f"{name} came from {module.__file__}, not from the wheel in {site}")
if not (pathlib.Path(site) / "fxcompress/py.typed").is_file():
    sys.exit("the wheel has no fxcompress/py.typed")
print(f"wheel: {len(names)} modules import from outside the checkout")
"""


def _modules() -> list[str]:
    """Every module that the wheel must hold; kernels only by file, as they may need a GPU's packages to import."""
    files = [*(_ROOT / "fxcompress").rglob("*.py"), *(_ROOT / "passes").rglob("*.py")]
    names = set()
    for file in files:
        parts = file.relative_to(_ROOT).with_suffix("").parts
        parts = ("fxcompress", *parts) if parts[0] == "passes" else parts
        names.add(".".join(part for part in parts if part != "__init__"))
    return sorted(name for name in names if not name.startswith("fxcompress.kernels"))


def main() -> None:
    """Exit non-zero, with the reason, when the wheel is not whole."""
    site = Path(sys.argv[1]).resolve()
    missing = [
        kernel.name
        for kernel in (_ROOT / "kernels").glob("*.py")
        if not (site / "fxcompress" / "kernels" / kernel.name).is_file()
    ]
    if missing:
        sys.exit(f"the wheel lacks these kernels: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as outside:
        probe = [sys.executable, "-c", _PROBE, str(site), *_modules()]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        sys.exit(subprocess.run(probe, cwd=outside, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
