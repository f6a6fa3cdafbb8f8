"""fine_tune in two processes (gloo, torchrun): the model that one process would train, the same everywhere, resumable."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import ArtifactError, UsageError
from fxcompress.train_parallel import Processes
from tests.helpers.digits import digits, training

SCRIPT = """
import sys
import torch
from torch import distributed
from tests.test_train_parallel import equal_share, in_parts

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.save((equal_share(rank, 2), in_parts(rank, sys.argv[1])), f"{sys.argv[1]}/rank{rank}.pt")
distributed.destroy_process_group()
"""


class Tiny(nn.Module):
    """A convolution with norm, one more, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.bn2 = nn.Conv2d(6, 6, 3, stride=2, groups=6), nn.BatchNorm2d(6)
        self.head = nn.Linear(54, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.deep(torch.relu(self.bn(self.conv(x)))))
        return torch.as_tensor(self.head(x.flatten(1)))


@cache
def captured() -> fxc.Program:
    torch.manual_seed(0)
    return fxc.capture(Tiny().eval(), (digits()[0][:4],))


def prepared(learn: bool = True, calibrated: bool = True) -> fxc.QATProgram:
    calibration = training()[:1] if calibrated else None
    return fxc.prepare_qat(captured(), learn_scale=learn, weight_bits=4, activation_bits=4, calibration=calibration)


State = dict[str, Tensor]


def equal_share(rank: int, count: int) -> State:
    """Trained on the ``rank``-th of ``count`` parts of each batch, with frozen norms, which alone depend on the part."""
    program = prepared()
    program.freeze_bn()
    data = [(x.chunk(count)[rank], labels.chunk(count)[rank]) for x, labels in training()[:4]]
    optimizer = torch.optim.SGD(program.gm.parameters(), 0.1, momentum=0.9)
    fxc.fine_tune(program, data, epochs=2, optimizer=optimizer, progress=False)
    return program.gm.state_dict()


def in_parts(rank: int, folder: str) -> tuple[State, State, dict[str, Any], dict[str, Any]]:
    """Two epochs, and one and another one from its checkpoint: weights and histories. The first batch sets the ranges."""

    def run(name: str, epochs: int) -> tuple[State, dict[str, Any]]:
        program = prepared(calibrated=False)
        torch.manual_seed(rank)
        data = torch.utils.data.TensorDataset(*(t[:192] for t in digits()))
        sampler: Any = torch.utils.data.DistributedSampler(data, seed=1)
        loader = torch.utils.data.DataLoader(data, 16, sampler=sampler)
        callback = fxc.QATCallback(program, freeze_bn=1)
        history = fxc.fine_tune(
            program,
            loader,
            epochs=epochs,
            lr=5e-3,
            checkpoint=f"{folder}/{name}",
            callbacks=[callback],
            evaluate=lambda m: rank,
        )
        return program.gm.state_dict(), history.to_dict()

    whole, history = run("whole", 2)
    run("parts", 1)
    return whole, *run("parts", 2), history


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes gives."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parent.parent
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(folder)]
    done = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("epoch 1/2") == 1 and done.stderr.count("epoch 2/2") == 2, "one process shows progress"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def same(a: State, b: State) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_two_processes_train_what_one_trains_on_the_whole_batch(both: list[Any]) -> None:
    (first, _), (second, _) = both
    alone, start = equal_share(0, 1), prepared().gm.state_dict()
    assert same(first, second)
    moved = [k for k in alone if alone[k].is_floating_point() and not torch.equal(alone[k], start[k])]
    assert {"conv.weight", "bn.weight", "head.bias"} <= set(moved) and sum("fake_quantize" in k for k in moved) >= 5
    for name in alone:
        # Sums in another order, and now and then a value that rounds to the other side: far less than what training did.
        change = (alone[name].double() - start[name].double()).norm()
        difference = (alone[name].double() - first[name].double()).norm()
        assert float(difference) <= 1e-3 * float(change), name


@pytest.mark.slow
def test_two_processes_stay_equal_and_resume_to_the_last_bit(both: list[Any]) -> None:
    (_, (first, resumed, log, history)), (_, (second, _, _, other)) = both
    assert same(first, second) and same(first, resumed)
    assert (history["resumed"], log["resumed"]) == (0, 1)
    for a, b in zip(history["epochs"], other["epochs"], strict=True):
        assert (a["loss"], a["score"], a["samples"]) == (b["loss"], b["score"], b["samples"])
        assert a["score"] == 0 and a["samples"] == 192
    assert history["epochs"][-1]["loss"] < history["epochs"][0]["loss"]


def test_alone_nothing_changes() -> None:
    processes = Processes.current()
    module = torch.nn.Linear(2, 2)
    assert (processes.rank, processes.count, processes.first) == (0, 1, True)
    assert processes.parallel(module) is module
    assert processes.total(1.0, 2.0) == [1.0, 2.0] and processes.first_value(None) is None
    state = {"torch": 1}
    assert processes.own_random_state(processes.random_states(state)) is state


def test_several_processes_neither_prune_nor_resume_another_count() -> None:
    pair = Processes(rank=1, count=2)
    program = captured()
    with pytest.raises(UsageError, match="FXC-USAGE-516"):
        pair.check([type("Pruner", (), {"program": program})()])
    pair.check([fxc.QATCallback(prepared(False))])
    with pytest.raises(ArtifactError, match="FXC-ARTIFACT-305"):
        pair.own_random_state({"torch": 0})
    assert pair.own_random_state({"processes": [1, 2]}) == 2
    with pytest.raises(ArtifactError, match="FXC-ARTIFACT-305"):
        Processes().own_random_state({"processes": [1, 2]})


def test_callbacks_hear_of_each_epoch() -> None:
    heard: list[int] = []

    class Listener:
        def begin_epoch(self, number: int) -> None:
            heard.append(number)

        def step(self, optimizer: Any) -> None:
            heard.append(-1)

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    fxc.fine_tune(model, training()[:2], epochs=2, callbacks=[Listener()], progress=False)
    assert heard == [0, -1, -1, 1, -1, -1]
