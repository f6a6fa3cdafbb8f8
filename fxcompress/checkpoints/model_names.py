"""Does every tensor of a checkpoint have a place in the model that its configuration describes?"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch

from fxcompress.errors import UsageError

__all__ = ["check_names"]

_log = logging.getLogger("fxcompress")
_LEAVES = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale", "input_zero_point",
)  # fmt: skip


def check_names(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Compare with the model that transformers makes from ``config``, without memory for its weights.

    Without transformers, or for a model it does not know, nothing is compared; the log says so.

    Raises:
        UsageError: a tensor has no place there (a bias that bias correction made), or one is missing.
    """
    model = _model(config)
    if model is None:
        return
    given = {_plain(name) for name in names}
    places: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        places.setdefault(id(tensor), []).append(name)
    known = {name for tied in places.values() for name in tied}
    strange = sorted(given - known)
    if strange:
        raise UsageError(
            596,
            f"{type(model).__name__} has no place for {', '.join(strange[:3])}",
            why=f"{len(strange)} tensors of the program are not in the model that config describes",
            fix="a bias: QuantizeStatic(bias_correction=False); a prefix in front of all names: pass prefix=",
        )
    missing = [tied[0] for tied in places.values() if not given.intersection(tied)]
    if missing:
        why = f"{type(model).__name__} has {len(missing)} tensors that the program has not"
        raise UsageError(
            597, f"the program lacks {missing[0]}", why=why, fix="capture the whole model, or pass its config"
        )


def _plain(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.weight" if leaf in _LEAVES else name


def _model(config: Mapping[str, Any]) -> torch.nn.Module | None:
    kind = config.get("model_type")
    if kind is None:
        return None
    try:
        import transformers
    except ImportError:
        _log.warning("transformers is not installed: the checkpoint's names were not compared with the model's")
        return None
    own = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config", "transformers_version")}
    try:
        made = transformers.AutoConfig.for_model(str(kind), **own)
        with torch.device("meta"):
            named = getattr(transformers, next(iter(config.get("architectures") or ()), ""), None)
            make = cast(Any, named or transformers.AutoModelForCausalLM.from_config)
            model: torch.nn.Module = make(made)
    except (ValueError, KeyError, AttributeError) as error:
        _log.warning("the checkpoint's names were not compared with the model's: %s", error)
        return None
    return model
