"""Every operator of the library keeps the contract of `check_kernel`, and is complete."""

import inspect
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fxcompress import check_kernel
from fxcompress.ops import KERNEL_MODULES, kernel_ops
from tests.kernels.cases import device

OPS = kernel_ops()


def test_every_operator_of_the_plan_is_there() -> None:
    linear = {f"{kind}_linear" for kind in ("w4a16", "w8a16", "w8a8", "w4a8", "sp24", "sp24_w8a8", "sp24_w4")}
    others = {"quantize_per_token", "rms_norm_quantize", "layer_norm_quantize", "conv2d_w8a8", "paged_attention"}
    assert linear | others <= set(OPS)


@pytest.mark.parametrize("name", sorted(OPS))
def test_contract(name: str) -> None:
    assert check_kernel(OPS[name], device=device()) >= 2


@pytest.mark.parametrize("name", sorted(OPS))
def test_reference_fake_and_launcher_take_the_same_arguments(name: str) -> None:
    op = OPS[name]
    module, _, function = op.launcher.partition(":")
    assert find_spec(module) is not None
    reference, fake = (list(inspect.signature(f).parameters) for f in (op.reference, op.fake))
    assert fake == reference
    if find_spec("triton") is not None:
        launcher = getattr(__import__(module, fromlist=[function]), function)
        taken = inspect.signature(launcher).parameters
        assert list(taken)[: len(reference)] == reference
        assert all(p.default is not p.empty for p in list(taken.values())[len(reference) :]), (
            "only optional ones behind"
        )


def test_operators_need_no_triton() -> None:
    """Registered, traced and run with neither Triton nor a GPU."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from fxcompress.ops import kernel_ops\n"
        "import torch\n"
        "op = kernel_ops()['quantize_per_token']\n"
        "print(op.overload(torch.ones(2, 8))[0].sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(127 * 16) and len(KERNEL_MODULES) >= 10


def test_schemas_are_stable() -> None:
    """Saved engines name their arguments: a renamed one breaks files."""
    schema = str(torch.ops.fxcompress.w4a16_linear.default._schema)
    assert schema.startswith(
        "fxcompress::w4a16_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, "
    )
