"""Training in several processes (``torchrun``): what `fine_tune` does differently when there is a process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fxcompress.errors import ArtifactError, UsageError
from fxcompress.ir import Program

__all__ = ["Processes"]


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together; one alone without a process group.

    Attributes:
        rank: Number of this one.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Those of the default process group, which the user's script has made."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """True in the one that writes checkpoints and shows progress."""
        return self.rank == 0

    def check(self, callbacks: Sequence[Any]) -> None:
        """Raises UsageError for a callback that changes the model's structure: every process would choose for itself."""
        if self.count > 1 and any(hasattr(c, "program") or hasattr(c, "masks") for c in callbacks):
            fix = "prune in one process, then train the result in several"
            raise UsageError(516, "a model cannot be pruned while several processes train it", fix=fix)

    def parallel(self, model: Any) -> Callable[..., Any]:
        """``model``, a program or a module, with gradients averaged over the processes."""
        module: nn.Module = model.gm if isinstance(model, Program) else model
        if self.count == 1 or isinstance(module, DistributedDataParallel):
            return cast(Callable[..., Any], model)
        device = next(module.parameters()).device
        devices = [device] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(module, device_ids=devices, find_unused_parameters=_may_skip(model))
        if not isinstance(model, Program):
            return wrapped

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = model.checked_call(args, kwargs)
            return wrapped(*args, **kwargs)

        return call

    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the first one's buffers: running statistics and ranges."""
        if self.count > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def total(self, *values: float) -> list[float]:
        """The sums over the processes."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(sums)
        return [float(v) for v in sums]

    def first_value(self, value: float | None) -> float | None:
        """The first process's value."""
        return value if self.count == 1 else self._objects(value)[0]

    def random_states(self, own: Any) -> Any:
        """For a checkpoint: the state of every process."""
        return own if self.count == 1 else {"processes": self._objects(own)}

    def own_random_state(self, saved: Any) -> Any:
        """Inverse of `random_states`. Raises ArtifactError when another number of processes wrote the checkpoint."""
        states = saved.get("processes", [saved])
        if len(states) != self.count:
            what = f"the checkpoint is of {len(states)} processes, this run has {self.count}"
            raise ArtifactError(305, what, fix="resume with as many processes, or with resume=False")
        return states[self.rank]

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def _objects(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, own)
        return found


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _may_skip(model: Any) -> bool:
    """True when a step may leave a parameter without a gradient: the graph does not read it, or a switch turns it off."""
    if not isinstance(model, Program):
        return False
    read: list[Tensor] = []
    for node in model.graph.nodes:
        if node.op == "call_module":
            read += model.module(node).parameters()
        elif node.op == "get_attr":
            read.append(model.tensor(node))
    known = {id(t) for t in read}
    switched = any(hasattr(m, "quantizing") for m in model.gm.modules())
    return switched or any(p.requires_grad and id(p) not in known for p in model.gm.parameters())
