"""How 2:4 products choose their way: configurations, the proof that lets the sparse kernel be used, the other routes."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels import sparse_proof
from fxcompress.kernels.configs import ASSUMED, Config, Problem
from fxcompress.kernels.sparse_common import F16, Packed
from fxcompress.ops import kernel_op
from tests.kernels.cases import error
from tests.kernels.sparse_problems import BOTH, KINDS, problem

triton = pytest.mark.triton
#: Of 16-bit results.
TOLERANCE = 5e-4


# ------------------------------------------------------------------------------------------------ configurations
@triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_choices_cut_the_problem_without_rest(kind: str, sm: int) -> None:
    from fxcompress.kernels.sparse_triton import MOST_ROWS, choose, constants

    k = KINDS[kind]
    for m in (0, 1, 7, 8, 9, 16, 33, 64, 65, MOST_ROWS, MOST_ROWS + 1):
        for n, depth in ((8, 64), (512, 512), (4096, 4096), (4096, 11008), (28672, 8192)):
            c = choose(Problem(k.family, m, n, depth, torch.float16), ASSUMED[sm], k)
            if m > MOST_ROWS:
                assert c.route == "cusparselt"
                continue
            units = -(-depth // k.unit)
            given = constants(c, k, units, 4 if kind == "sp24_w4" else 0)
            assert given["KW"] * given["WM"] * given["WN"] == c.num_warps
            assert given["MT"] % given["WM"] == 0 and given["NT"] % given["WN"] == 0 and given["STAGES"] >= 2
            assert given["KW"] * given["U"] * k.unit == c.block_k and c.split_k >= 1
            ring = given["STAGES"] * given["U"] * k.steps * given["KW"] * c.block_m * 64
            assert ring <= ASSUMED[sm].shared_memory


@triton
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_valid(kind: str) -> None:
    from fxcompress.kernels.sparse_triton import candidates, constants

    k = KINDS[kind]
    for m in (1, 40, 1000):
        made = candidates(Problem(k.family, m, 4096, 4096, torch.float16), ASSUMED[90], k)
        assert len(made) > 10 and {c.route for c in made} == {"kernel", "dense", "cusparselt"}
        for c in made[:-2]:
            given = constants(c, k, 4096 // k.unit, 0)
            assert given["KW"] * given["WM"] * given["WN"] == c.num_warps and given["U"] >= 1
            assert given["MT"] % given["WM"] == 0 and given["NT"] % given["WN"] == 0


@triton
@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("name", KINDS)
def test_compile_cases(name: str, sm: int) -> None:
    module = __import__(f"fxcompress.kernels.{name}_triton", fromlist=["compile_cases"])
    made = module.compile_cases(sm)
    assert len({c.name for c in made}) == len(made) >= 8
    for case in made:
        names = set(case.kernel.arg_names) if case.gluon else set(case.signature) | set(case.constants)
        assert set(case.signature) | set(case.constants) == names


# ------------------------------------------------------------------------------------------------ proof and routes
@pytest.fixture
def fresh() -> Any:
    sparse_proof.forget_proofs()
    yield
    sparse_proof.forget_proofs()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, fresh: None) -> Any:
    """A GPU, as far as the proof can see."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "pretended")
    return monkeypatch


CUDA = torch.device("cuda")


def test_nothing_is_proven_in_main_memory() -> None:
    weight = problem(F16, 1, 16, 64).weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sparse_proof.proven(F16, torch.float16, torch.device("cpu"))
        assert not sparse_proof.prepare(weight, torch.float16, cusparselt=True)


@triton
def test_proof_runs_once(pretended: Any) -> None:
    calls = []

    def right(*given: Any) -> float:
        calls.append(given)
        return 0.0

    pretended.setattr(sparse_proof, "_error", right)
    assert sparse_proof.proven(F16, torch.float16, CUDA) and sparse_proof.proven(
        F16, torch.float16, torch.device("cuda:0")
    )
    assert len(calls) == 3 and sparse_proof.proven(F16, torch.bfloat16, CUDA) and len(calls) == 6


@triton
@pytest.mark.parametrize("what", ["wrong", "raises", "does not compile", "old"])
def test_failed_proof_warns_once(pretended: Any, what: str) -> None:
    from triton.compiler.errors import CompilationError

    def fails(*_: Any) -> float:
        raise RuntimeError("one\ntwo")

    def refused(*_: Any) -> float:
        raise CompilationError("", None, "no such thing")

    tried = {"wrong": lambda *_: 0.7, "raises": fails, "does not compile": refused, "old": lambda *_: 0.0}
    pretended.setattr(sparse_proof, "_error", tried[what])
    if what == "old":
        pretended.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    message = {
        "wrong": "relative error 0.7", "raises": "RuntimeError: two", "does not compile": "no such thing",
        "old": "capability 7.5",
    }[what]  # fmt: skip
    with pytest.warns(UserWarning, match=message):
        assert not sparse_proof.proven(F16, torch.float16, CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sparse_proof.proven(F16, torch.float16, CUDA)


@triton
def test_not_a_number_is_no_proof(pretended: Any) -> None:
    pretended.setattr(sparse_proof, "_error", lambda *_: float("nan"))
    with pytest.warns(UserWarning, match="nan"):
        assert not sparse_proof.proven(F16, torch.float16, CUDA)


def test_no_proof_while_capturing(pretended: Any) -> None:
    pretended.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UsageError, match="prepare") as caught:
        sparse_proof.proven(F16, torch.float16, CUDA)
    assert caught.value.id == "FXC-USAGE-447"


def emulated(rows: Tensor, weight: Packed, out: Tensor, after: Any, config: Config) -> None:
    """`fxcompress.kernels.sparse_triton.multiply`, with the kernel emulated."""
    from fxcompress.kernels import sparse_gluon, sparse_triton
    from tests.kernels.mma_sp_emulator import run_kernel

    grid, arguments, parts = sparse_triton.plan(rows, weight, out, after, config)
    run_kernel(sparse_gluon, "mma_sp_kernel", grid, arguments)
    if parts is not out:
        sparse_triton.add_parts(parts, out, after)


@triton
@pytest.mark.parametrize("kind", KINDS)
def test_launchers_hand_everything_to_the_sparse_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of the operators through the launchers, as on a proven device, against the references."""
    from fxcompress.kernels import sp24_triton, sp24_w8a8_triton

    if torch.cuda.is_available():
        pytest.skip("here the kernel itself is tested")
    used: list[Config] = []

    def multiply(rows: Tensor, weight: Packed, out: Tensor, after: Any, config: Config) -> None:
        used.append(config)
        emulated(rows, weight, out, after, config)

    for module in (sp24_triton, sp24_w8a8_triton):
        monkeypatch.setattr(module, "proven", lambda *_: True)
        monkeypatch.setattr(module, "multiply", multiply)
    op = kernel_op(f"{kind}_linear")
    launch = importlib.import_module(f"fxcompress.kernels.{kind}_triton").launch
    for given in op.samples("cpu"):
        expected, before = op.reference(*given), len(used)
        got = launch(*given)
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert len(used) == before + (got.numel() > 0)
        assert got.numel() == 0 or error(got, expected) <= op.tolerance[got.dtype]


@triton
@pytest.mark.parametrize("kind", KINDS)
def test_proof_accepts_the_emulated_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof's own problems, with the kernel emulated; and it notices a wrong one."""
    from fxcompress.kernels import sparse_triton

    monkeypatch.setattr(sparse_triton, "multiply", emulated)
    dtype = torch.int8 if kind == "sp24_w8a8" else torch.float16
    m, n, k, group = sparse_proof._problems(KINDS[kind])[0]
    assert (
        sparse_proof._error(KINDS[kind], dtype, torch.device("cpu"), m, n, k, group) <= sparse_proof._TOLERANCE[dtype]
    )
    monkeypatch.setattr(sparse_triton, "multiply", lambda rows, weight, out, after, config: out.fill_(1))
    assert sparse_proof._error(KINDS[kind], dtype, torch.device("cpu"), m, n, k, group) > 0.1


@triton
def test_route_to_cusparselt(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Only with a copy of these very values, made before."""
    from fxcompress.kernels import sp24_triton

    seen = []

    def product(copy: Tensor, x: Tensor, out_dtype: Any = None) -> Tensor:
        seen.append((tuple(copy.shape), tuple(x.shape)))
        return (copy.double() @ x.double()).to(x.dtype)

    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product, raising=False)
    case = problem(F16, 7, 40, 200)
    large = Config(route="cusparselt")

    def run(weight: Packed) -> Tensor:
        return sp24_triton.launch(case.x, weight.values, weight.meta, 40, None, "relu", None, large)

    expected = torch.relu(case.expected)
    assert error(run(case.weight), expected) < 1e-3 and not seen
    sparse_proof._compress(case.weight)
    assert error(run(case.weight), expected) < 1e-3 and seen == [((64, 256), (256, 16))]
    other = Packed(case.weight.values.clone(), case.weight.meta, 40)
    run(other)
    assert len(seen) == 1  # a copy has no copy
    case.weight.values.mul_(1)
    run(case.weight)
    assert len(seen) == 1  # written to since


@triton
def test_copies_for_cusparselt_die_with_the_weight(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense, raising=False)
    weight = problem(F16, 1, 16, 64).weight
    sparse_proof._compress(weight)
    assert len(sparse_proof._COPIES) == 1
    del weight
    assert not sparse_proof._COPIES


# ------------------------------------------------------------------------------------------------ a device
@pytest.mark.cuda
@triton
@pytest.mark.parametrize(("kind", "dtype"), BOTH)
def test_device_is_proven(kind: str, dtype: torch.dtype, fresh: None) -> None:
    """The order of the metadata, on hardware."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparse_proof.proven(KINDS[kind], dtype, CUDA)


@pytest.mark.cuda
@triton
def test_cusparselt_on_a_device(fresh: None) -> None:
    from fxcompress.kernels import sp24_triton

    if not torch.backends.cusparselt.is_available():
        pytest.skip("this build of PyTorch has no cuSPARSELt")
    case = problem(F16, 1030, 200, 520).to("cuda")
    assert sparse_proof.prepare(case.weight, torch.float16, cusparselt=True)
    assert sparse_proof.compressed(case.weight) is not None
    weight = case.weight
    got = sp24_triton.launch(case.x, weight.values, weight.meta, weight.n)
    assert error(got, case.expected) <= TOLERANCE
