"""Where the packages lie: ``passes/`` and ``kernels/`` stand beside ``fxcompress/`` and are installed inside it.

``fxcompress/passes`` and ``fxcompress/kernels`` are relative links to them, so that the checkout runs uninstalled.
``kernels/`` has no ``__init__.py``: with one, the checkout on ``sys.path`` would hide another project's ``kernels``.
"""

from setuptools import find_packages, setup

LINKED = ("passes", "kernels")

setup(
    packages=[
        *find_packages(
            include=["fxcompress", "fxcompress.*"],
            exclude=[pattern for name in LINKED for pattern in (f"fxcompress.{name}", f"fxcompress.{name}.*")],
        ),
        *(f"fxcompress.{name}" for name in LINKED),
    ],
    package_dir={f"fxcompress.{name}": name for name in LINKED},
)
