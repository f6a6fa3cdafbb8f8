"""SparsityMasks: which weights are zero, kept so through training, made permanent, or undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.layerwise.store import WeightStore

__all__ = ["Sparsity", "SparsityMasks"]


@dataclass(frozen=True)
class Sparsity:
    """Zeros counted in the weights.

    Attributes:
        zeros: Zeros of each sparse layer's weight.
        sizes: Its number of weights.
    """

    zeros: dict[str, int]
    sizes: dict[str, int]

    @property
    def layers(self) -> dict[str, float]:
        """Share of zeros of each layer, 0 to 1."""
        return {name: zeros / self.sizes[name] for name, zeros in self.zeros.items()}

    @property
    def total(self) -> float:
        """Share of zeros in all the sparse layers together."""
        return sum(self.zeros.values()) / max(1, sum(self.sizes.values()))

    def __str__(self) -> str:
        lines = [f"{share:7.2%}  {self.sizes[name]:>12,}  {name}" for name, share in self.layers.items()]
        return "\n".join([*lines, f"{self.total:7.2%}  {sum(self.sizes.values()):>12,}  total"])


class SparsityMasks:
    """The masks that `sparsify` found, bound to the model they are for.

    Weights are looked up by layer name whenever they are needed, so a model may be moved to another device in between.

    Args:
        model: The model, or the program.
        kept: Layer name -> bool tensor of the shape of its weight, True where the weight is kept.
        store: Remembers the tensors as they were; None when they are not known.
        notes: What was left alone and why.
        settings: How the masks were made, for the record.

    Attributes:
        kept: As above.
        notes: As above.
        settings: As above.
    """

    def __init__(
        self,
        model: Program | nn.Module,
        kept: Mapping[str, Tensor],
        store: WeightStore | None = None,
        notes: list[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._root: nn.Module = model.gm if isinstance(model, Program) else model
        self.kept = dict(kept)
        self.notes = list(notes or [])
        self.settings = dict(settings or {})
        self._store = store
        self._handles: list[RemovableHandle] = []
        self._ended = ""
        self._check(self.kept)

    def sparsity(self) -> Sparsity:
        """Zeros counted in the weights as they are now, per layer and in total."""
        weights = {name: self._weight(name) for name in self.kept}
        zeros = {name: w.numel() - int(torch.count_nonzero(w.detach())) for name, w in weights.items()}
        return Sparsity(zeros, {name: w.numel() for name, w in weights.items()})

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero, in place: call it after each ``optimizer.step()``, or `attach`."""
        self._check_alive()
        for name, kept in self.kept.items():
            weight = self._weight(name)
            if kept.device != weight.device:
                kept = self.kept[name] = kept.to(weight.device)
            weight.masked_fill_(~kept, 0)

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call `apply` after every step of ``optimizer``.

        Returns:
            A handle whose ``remove()`` ends it; `remove` and `restore` do too.

        Raises:
            PruneError: the optimizer updates none of the sparse weights.
        """
        self._check_alive()
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(self._weight(name)) in updated for name in self.kept):
            why = "it was made before the weights were replaced, or for another model"
            fix = "make the optimizer after sparsify, from the parameters of the model or program that was given to it"
            raise PruneError(210, "the optimizer updates none of the sparse weights", why=why, fix=fix)
        handle = optimizer.register_step_post_hook(lambda *_: self.apply())
        self._handles.append(handle)
        return handle

    def remove(self) -> None:
        """Make the zeros permanent: apply them once more, end all hooks, forget masks and original weights."""
        self.apply()
        self._end("removed")
        if self._store is not None:
            self._store.forget()

    def restore(self) -> None:
        """Put back every tensor as it was before `sparsify`; training done since then is lost.

        Raises:
            PruneError: the original weights are not known (masks that were loaded), or were let go by `remove`.
        """
        self._check_alive()
        if self._store is None:
            why = "masks read from a state dict do not come with them"
            raise PruneError(211, "the original weights are not known", why=why, fix="load the dense checkpoint")
        self._end("restored")
        self._store.undo()

    def state_dict(self) -> dict[str, Any]:
        """Masks and settings: tensors, strings and numbers only, so ``torch.load(weights_only=True)`` reads it."""
        return {"kept": {name: mask.clone() for name, mask in self.kept.items()}, "settings": dict(self.settings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the masks of a state dict and apply them. Original weights stay known.

        Raises:
            PruneError: it has other layers, or a mask of another shape.
        """
        self._check_alive()
        kept = cast(Mapping[str, Tensor], state["kept"])
        self._check(kept)
        self.kept = {name: mask.to(self._weight(name).device).clone() for name, mask in kept.items()}
        self.settings = dict(state["settings"])
        self.apply()

    @classmethod
    def from_state_dict(cls, model: Program | nn.Module, state: Mapping[str, Any]) -> SparsityMasks:
        """Masks from a state dict for ``model``, which may be dense; they are applied at once.

        A program's weights are replaced, a module's are written to, as `sparsify` does.

        Raises:
            PruneError: the model lacks a layer, or a mask has another shape than its weight.
        """
        store = WeightStore(model.gm, True) if isinstance(model, Program) else None
        masks = cls(model, state["kept"], settings=state["settings"])
        if store is not None:
            for name, kept in masks.kept.items():
                weight = masks._weight(name)
                store.put(masks._root.get_submodule(name), "weight", weight.detach() * kept.to(weight.device))
        masks.load_state_dict(state)
        return masks

    def __str__(self) -> str:
        return "\n".join([str(self.sparsity()), *(f"note: {note}" for note in self.notes)])

    def _weight(self, name: str) -> Tensor:
        return cast(Tensor, self._root.get_submodule(name)._parameters["weight"])

    def _end(self, how: str) -> None:
        self._ended = how
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _check_alive(self) -> None:
        if self._ended:
            fix = "call sparsify again"
            raise PruneError(212, "these masks are not in force any more", why=f"they were {self._ended}", fix=fix)

    def _check(self, kept: Mapping[str, Tensor]) -> None:
        for name, mask in kept.items():
            try:
                shape = tuple(self._weight(name).shape)
            except (AttributeError, KeyError):
                raise PruneError(
                    213, f"the model has no layer {name!r} with a weight", fix="load its own masks"
                ) from None
            if mask.dtype != torch.bool or tuple(mask.shape) != shape:
                what = f"the mask of {name} is {mask.dtype} {list(mask.shape)}, its weight has shape {list(shape)}"
                raise PruneError(214, what, fix="load the masks of this very model")
