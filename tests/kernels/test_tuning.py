"""Tuning without a GPU: candidates, the choice among them with a made-up clock, and the table they are kept in."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fxcompress import tuning
from fxcompress.capture import capture
from fxcompress.engines.signature import IOSignature
from fxcompress.errors import UsageError
from fxcompress.gpu_clock import CudaClock
from fxcompress.kernels import candidates as candidates_
from fxcompress.kernels import configs
from fxcompress.kernels.configs import ASSUMED, Config, Problem
from fxcompress.kernels.workloads import WORKLOADS, problem_of, workload
from fxcompress.ops import KernelOp, kernel_op
from fxcompress.tuning_shapes import MODELS, check_families, problems_of_engine, problems_of_shapes, shapes_of

A100 = ASSUMED[80]
SMALL = Problem("w8a8", 3, 64, 128, torch.int8)
FIRST = Config(16, 64, 128, 1, 4, 4)


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXCOMPRESS_CONFIGS", str(tmp_path / "tables"))
    configs.forget_tables()
    return tmp_path / "tables"


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose heuristic gives FIRST for everything."""
    monkeypatch.setattr(candidates_, "_module", lambda family: Family)
    monkeypatch.setattr(tuning, "kernel_op", lambda name: stub_op())


class Family:
    @staticmethod
    def choose(problem: Problem, device: configs.Device) -> Config:
        if problem.m > 4:
            return Config(route="dequantize") if problem.m > 600 else Config(block_n=32)
        return configs.lookup(problem, device) or FIRST


def stub_op(launch: Callable[[Tensor], Tensor] = lambda x: 2.0 * x.float()) -> Any:
    """An operator that doubles ``x``, whatever else it is given."""

    class Op:
        tolerance = KernelOp("", lambda: None, lambda: None, "").tolerance

        def reference(self, x: Tensor, **rest: Any) -> Tensor:
            return 2.0 * x.float()

        fake = reference

        def launch(self, x: Tensor, **rest: Any) -> Tensor:
            return launch(x)

    return Op()


class FakeClock:
    """Says what ``cost`` says of the configuration in force, and makes every call once."""

    def __init__(self, cost: Callable[[Config], float], *, graphs: bool = True) -> None:
        self.cost, self.graphs = cost, graphs
        self.timed: list[Config] = []

    def eager(self, calls: Sequence[Callable[[], Any]], seconds: float) -> float:
        for call in calls:
            call()
        config = configs.lookup(SMALL, A100)
        assert config is not None, "what is timed is forced"
        self.timed.append(config)
        return self.cost(config)

    def graph(self, calls: Sequence[Callable[[], Any]], seconds: float) -> float | None:
        return self.eager(calls, seconds) if self.graphs else None


def distance(wanted: Config) -> Callable[[Config], float]:
    """A cost that is least at ``wanted``."""
    names = ("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages")
    return lambda c: 10.0 + sum(abs(getattr(c, n) - getattr(wanted, n)) for n in names)


# ------------------------------------------------------------------------------------------------ candidates
def test_candidates_begin_with_the_heuristic_and_stay_in_range(chosen: None) -> None:
    found = candidates_.candidates(SMALL, A100)
    assert found[0] == FIRST and len(set(found)) == len(found) > 10
    assert replace(FIRST, block_n=128) in found and replace(FIRST, swap_ab=True) in found
    assert Config(block_n=32) in found, "the choice for twice as many rows"
    assert all(8 <= c.block_m <= 256 and c.num_stages >= 2 and c.split_k >= 1 for c in found)
    assert candidates_.neighbours(Config(route="dequantize")) == []
    large = candidates_.candidates(replace(SMALL, m=4096), A100)
    assert large[:2] == [Config(route="dequantize"), Config(block_n=32)] and replace(large[1], num_warps=8) in large


def test_a_family_may_list_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Family):
        @staticmethod
        def candidates(problem: Problem, device: configs.Device) -> list[Config]:
            return [Config(route="dequantize"), FIRST]

    monkeypatch.setattr(candidates_, "_module", lambda family: Own)
    assert candidates_.candidates(SMALL, A100) == [FIRST, Config(route="dequantize")]


@pytest.mark.triton
@pytest.mark.parametrize("family", sorted(WORKLOADS))
def test_a_forced_configuration_is_what_the_kernel_chooses(family: str) -> None:
    """The table's key is the one the launcher looks for: the arguments' own problem is the one they were made for."""
    problem = workload(family).problem(5, 64, 256, torch.float16, 128)
    assert problem is not None
    arguments = workload(family).arguments(problem, "cpu")
    assert problem_of(workload(family).op, (), arguments) == problem
    before = os.environ["FXCOMPRESS_CONFIGS"]
    odd = replace(candidates_.heuristic(problem, A100), num_stages=7)
    seen: list[str] = []

    def lookup(asked: Problem, device: configs.Device) -> Config | None:
        seen.append(asked.key())
        return configs.lookup(asked, device)

    modules = [m for name, m in sys.modules.items() if name.startswith("fxcompress.kernels.") and hasattr(m, "lookup")]
    with tuning.forced(problem, odd, A100):
        assert candidates_.heuristic(problem, A100) == odd
        with pytest.MonkeyPatch.context() as patch:
            for module in modules:
                if module is not configs:
                    patch.setattr(module, "lookup", lookup)
            kernel_op(workload(family).op).launch(**arguments)
    assert problem.key() in seen, f"the launcher asked for {seen}"
    assert os.environ["FXCOMPRESS_CONFIGS"] == before and candidates_.heuristic(problem, A100) != odd


# ------------------------------------------------------------------------------------------------ choosing
def test_the_fastest_neighbour_of_neighbours_wins_and_is_kept(chosen: None) -> None:
    wanted = replace(FIRST, block_n=128, num_stages=3)
    clock = FakeClock(distance(wanted))
    seen: list[tuple[Problem, bool]] = []
    found = tuning.tune(
        [SMALL], A100, clock, place="cpu", found=lambda problem, tuned: seen.append((problem, tuned is not None))
    )
    assert [t.config for t in found] == [wanted] and found[0].us == 10.0
    assert found[0].heuristic_us == distance(wanted)(FIRST) and seen == [(SMALL, True)]
    assert len(set(clock.timed)) == len(clock.timed) == found[0].tried, "nothing is measured twice"
    assert configs.lookup(SMALL, A100) == wanted == candidates_.heuristic(SMALL, A100)
    json.dumps(found[0].to_dict())


def test_wrong_and_failing_candidates_are_refused(chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(x: Tensor) -> Tensor:
        config = configs.lookup(SMALL, A100)
        assert config is not None
        if config.num_warps == 8:
            raise RuntimeError("out of resource: shared memory")
        y = 2.0 * x.float()
        return y.fill_(float("nan")) if config.block_n == 128 else y * 1.01 if config.split_k == 2 else y

    monkeypatch.setattr(tuning, "kernel_op", lambda name: stub_op(launch))
    clock = FakeClock(distance(replace(FIRST, block_n=128, split_k=2, num_warps=8)), graphs=False)
    found = tuning.tune_one(SMALL, A100, clock, place="cpu")
    assert found is not None and found.config.split_k == 1 and found.config.block_n != 128
    reasons = " ".join(found.refused.values())
    assert "out of resource" in reasons and "relative error 1.0e-02" in reasons and "relative error inf" in reasons
    monkeypatch.setattr(tuning, "kernel_op", lambda name: stub_op(lambda x: x.float()))
    assert tuning.tune_one(SMALL, A100, clock, place="cpu") is None
    assert tuning.tune([SMALL], A100, clock, place="cpu") == [] and configs.lookup(SMALL, A100) is None


def test_no_problem_is_begun_after_the_time_is_up(chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr("fxcompress.tuning.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    problems = [replace(SMALL, m=m) for m in (3, 3, 3, 3)]
    clock = FakeClock(distance(FIRST))
    assert len(tuning.tune(problems, A100, clock, place="cpu", gpu_time=25.0)) == 2


def test_relative_error() -> None:
    a = torch.tensor([3.0, 4.0])
    assert tuning.relative_error(a, a) == 0.0
    assert tuning.relative_error(a + torch.tensor([0.0, 0.5]), a) == pytest.approx(0.1)
    assert tuning.relative_error((a, a.int()), (a, a.int() + 1)) == float("inf")
    assert tuning.relative_error(a * float("nan"), a) == tuning.relative_error(a[:1], a) == float("inf")
    assert tuning.relative_error(a.half(), a) == 0.0 and tuning.relative_error(a.int(), a) == float("inf")
    assert tuning.relative_error([], []) == 0.0
    op = kernel_op("w8a16_linear")
    given = workload("w8a16").arguments(Problem("w8a16", 2, 16, 64, torch.float16, 32), "cpu")
    assert tuning.exact_reference(op, **given).dtype == torch.float64
    integers, _ = tuning.exact_reference(kernel_op("quantize_per_token"), given["x"])
    assert integers.dtype == torch.int8, "float64 would round elsewhere"


def test_weights_rotate_and_activations_do_not() -> None:
    work = workload("w8a8")
    sets = tuning.rotated(work, SMALL, "cpu", cache=64 * 128)
    assert len(sets) == 4 and len({s["weight"].data_ptr() for s in sets}) == 4
    assert len({s["x"].data_ptr() for s in sets}) == 1 and torch.equal(sets[0]["weight"], sets[3]["weight"])
    assert len(tuning.rotated(work, SMALL, "cpu", cache=0)) == 1


# ------------------------------------------------------------------------------------------------ the table
def test_results_are_merged_into_the_table(own_tables: Path) -> None:
    def tuned(problem: Problem, config: Config) -> tuning.Tuned:
        return tuning.Tuned(problem, config, 1.0, 2.0, 3, {})

    other = Problem("w4a16", 1, 64, 128, torch.float16, 32)
    path = tuning.save_entries(A100, [tuned(SMALL, FIRST)])
    tuning.save_entries(A100, [tuned(other, FIRST), tuned(SMALL, replace(FIRST, block_n=32))])
    assert path == own_tables / "configs_nvidia-a100.json"
    table = configs.read_table(path)
    assert table == {"w8a8": {SMALL.key(): replace(FIRST, block_n=32)}, "w4a16": {other.key(): FIRST}}
    content = json.loads(path.read_text())
    assert (content["schema"], content["gpu"], content["sm"], content["source"]) == (1, "NVIDIA A100", 80, "measured")
    assert configs.lookup(replace(SMALL, m=4), A100) == replace(FIRST, block_n=32), "3 and 4 rows share a bucket"


def test_a_table_that_cannot_be_replaced_stays(own_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tuning.Tuned(SMALL, FIRST, 1.0, None, 1, {})
    path = tuning.save_entries(A100, [one])
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        tuning.save_entries(A100, [replace(one, config=replace(FIRST, block_n=32))])
    assert path.read_bytes() == before and [p.name for p in own_tables.iterdir()] == [path.name]
    path.write_text("{")
    configs.forget_tables()
    with pytest.raises(UsageError, match="FXC-USAGE-404"):
        tuning.save_entries(A100, [one])


# ------------------------------------------------------------------------------------------------ which problems
def test_shapes_by_name_and_by_number() -> None:
    assert MODELS["llama-3-8b"] == ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096))
    assert shapes_of("llama-3-8b, 96x64,96x64") == [*MODELS["llama-3-8b"], (96, 64)]
    with pytest.raises(UsageError, match="FXC-USAGE-461 no set of shapes is called 'llama-9'"):
        shapes_of("llama-9")
    with pytest.raises(UsageError, match="FXC-USAGE-462 no kernel family is called 'w3'"):
        check_families(["w4a16", "w3"])
    assert check_families([""]) == list(WORKLOADS)


def test_problems_a_family_cannot_compute_are_left_out() -> None:
    found = problems_of_shapes([(576, 576), (1536, 1536)], ["w4a16", "w8a8"], rows=[1, 16])
    assert Problem("w4a16", 1, 1536, 1536, torch.float16, 128) in found
    assert Problem("w8a8", 16, 576, 576, torch.int8, 0) in found
    assert not any(p.family == "w4a16" and p.k == 576 for p in found), "576 is no multiple of 128"
    assert len(found) == 6


def saved_engine(folder: Path) -> Path:
    """A folder whose graph multiplies int8 activations with int8 weights [32, 64]."""
    kernel_op("w8a8_linear")
    signature = IOSignature.of(capture(nn.Linear(64, 32), (torch.randn(3, 64),))).to_dict()
    signature["inputs"][0]["dtype"] = "int8"
    names = ("weight", "x_scale", "w_scale")
    nodes = [{"name": "x", "op": "placeholder", "target": "x", "args": [], "kwargs": {}}]
    nodes += [{"name": n, "op": "get_attr", "target": n, "args": [], "kwargs": {}} for n in names]
    arguments = {n: {"node": n} for n in ("x", *names)} | dict.fromkeys(("x_zero", "w_sum", "bias"))
    call = {"args": [], "kwargs": {**arguments, "out_dtype": {"dtype": "float16"}}}
    nodes.append({"name": "y", "op": "call_function", "target": "fxcompress.w8a8_linear.default", **call})
    folder.mkdir()
    content = {"nodes": nodes, "outputs": [{"node": "y"}], "modules": {}, "aliases": {}}
    (folder / "program.json").write_text(json.dumps(content))
    (folder / "manifest.json").write_text(json.dumps({"engine": "triton", "signature": signature}))
    weight = torch.zeros(32, 64, dtype=torch.int8)
    save_file({"weight": weight, "x_scale": torch.ones(1), "w_scale": torch.ones(32)}, folder / "weights.safetensors")
    return folder


def test_problems_of_a_saved_engine(tmp_path: Path) -> None:
    folder = saved_engine(tmp_path / "engine")
    found = problems_of_engine(folder, ["w8a8", "w4a16"], rows=[1, 64])
    assert found == [Problem("w8a8", m, 32, 64, torch.int8, 0) for m in (1, 64)]
    with pytest.raises(UsageError, match=r"FXC-USAGE-464 .*calls no kernels of the families w4a16"):
        problems_of_engine(folder, ["w4a16"])
    with pytest.raises(UsageError, match=r"FXC-USAGE-463 .*is no folder saved by fxcompress"):
        problems_of_engine(tmp_path, ["w4a16"])


# ------------------------------------------------------------------------------------------------ on a GPU
@pytest.mark.cuda
def test_the_clock_agrees_with_the_memory() -> None:
    """A copy of 256 MiB cannot be faster than 20 TB/s, nor slower than 0.1; a graph of it takes as long."""
    source = torch.randint(0, 100, (1 << 26,), dtype=torch.int32, device="cuda")
    targets = [torch.empty_like(source) for _ in range(2)]
    copies = [partial(target.copy_, source) for target in targets]
    clock = CudaClock()
    eager, graph = clock.eager(copies, 0.05), clock.graph(copies, 0.05)
    assert graph is not None and graph == pytest.approx(eager, rel=0.25)
    assert 1e11 < 2 * source.nbytes / (eager * 1e-6) < 2e13


@pytest.mark.cuda
def test_what_cannot_be_captured_has_no_graph_and_leaves_the_device_usable() -> None:
    x = torch.ones(8, device="cuda")
    assert CudaClock().graph([lambda: float(x.sum())], 0.01) is None
    assert float(x.sum()) == 8.0


@pytest.mark.cuda
@pytest.mark.triton
@pytest.mark.parametrize("family", sorted(WORKLOADS))
def test_tuning_on_the_device(family: str, own_tables: Path) -> None:
    device = configs.device_of(torch.empty(0, device="cuda"))
    problem = workload(family).problem(16, 512, 1024, torch.float16, 128)
    assert problem is not None
    (found,) = tuning.tune([problem], device, CudaClock())
    assert 0 < found.us <= (found.heuristic_us or float("inf")) and found.tried > 3
    assert found.heuristic_us is not None, f"the formula's choice is not usable: {found.refused}"
    assert candidates_.heuristic(problem, device) == found.config
