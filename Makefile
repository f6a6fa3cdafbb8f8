# Two commands do everything on a machine that has Python 3.11+, its venv module and make:
#   make demo    train a small network, compress it for both engines, print the before/after table
#   make test    lint, types, wheel and the whole test suite
#   make bench   the measurements behind the README's claims, beside the peers (BENCH_FLAGS=--quick for a short run)
#   make kernels-lint   compile the GPU kernels for three chips, no GPU needed; the tables of docs/kernels.md (LINT_FLAGS=--triton 3.6 ...)
#   make clean   remove what the above made
# PIP_FLAGS goes to pip install: point it at an index with CPU-only builds of torch to save gigabytes without a GPU.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n auto --dist worksteal
BENCH_FLAGS ?=
LINT_FLAGS ?=
DEMO_OUT ?= demo_out

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
INPUTS := pyproject.toml setup.py constraints.txt

.PHONY: help demo test lint types wheel bench kernels-lint clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/digits.py --out $(DEMO_OUT)

# pytest comes last, so that its closing line is the last line.
test: lint types wheel
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# The wheel must hold the linked folders too: install it alone in a folder and import it from there.
wheel: $(VENV)/.installed-dev
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/site build/wheel/*.whl
	$(BIN)/python tests/check_wheel.py build/site

# The scripts that measure a claim are those that read the benchmarks' common options.
bench: $(VENV)/.installed-bench
	@set -e; scripts=$$(grep -lE '= (harness[.])?arguments[(]' benchmarks/*.py); for script in $$scripts; do \
		name=$$(basename $$script .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(BENCH_FLAGS); \
	done

# What a kernel is compiled to, what that should make of an A100 and an H200, and the pages that say so.
kernels-lint: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.kernel_lint $(LINT_FLAGS)
	$(BIN)/python -m benchmarks.kernel_model
	$(BIN)/python -m benchmarks.tables

clean:
	rm -rf $(VENV) build dist *.egg-info $(DEMO_OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fxcompress needs Python 3.11 or newer; choose one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch is named in the same command as the rest: what depends on "any torch" then keeps the build that was chosen.
$(VENV)/.installed-demo: $(INPUTS) | $(BIN)/python
	$(PIP_INSTALL) torch -e '.[all]' scikit-learn
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	$(PIP_INSTALL) torch -e '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(INPUTS) | $(BIN)/python
	$(PIP_INSTALL) torch -e '.[bench]'
	@touch $@
