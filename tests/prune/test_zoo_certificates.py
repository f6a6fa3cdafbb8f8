"""The certificate on whole architectures: small builds of the capture tests' zoo, half of every group of channels gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxcompress as fxc
from fxcompress.passbase import output_error
from tests.helpers.capture_checks import Inputs, images

pytest.importorskip("torchvision", reason="needs torchvision", exc_type=ImportError)
pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)

from tests.capture import test_zoo_timm as timm_zoo
from tests.capture import test_zoo_torchvision as torchvision_zoo
from tests.capture import test_zoo_transformers as transformers_zoo

#: Architecture -> largest share of its parameters that may be left. Where norms run over the residual width
#: it stays, and more is left.
TIMM = {
    "resnet18": 0.3,
    "resnetv2_50": 0.3,
    "convnext_atto": 0.65,
    "inception_next_atto": 0.35,
    "starnet_s1": 0.3,
    "vit_tiny_patch16_224": 0.6,
    "beit_base_patch16_224": 0.7,
    "mixer_s32_224": 0.7,
    "resmlp_12_224": 0.35,
    "convmixer_768_32": 0.35,
}
TORCHVISION = {
    "vgg": 0.3,
    "resnet": 0.3,
    "densenet": 0.4,
    "squeezenet": 0.3,
    "shufflenet_v2": 0.4,
    "mobilenet_v3": 0.4,
    "efficientnet": 0.4,
    "regnet": 0.35,
    "vit": 0.7,
}
TRANSFORMERS = {
    "bert": 0.7,
    "distilbert": 0.7,
    "gpt2": 0.7,
    "llama": 0.7,
    "albert": 0.7,
    "convnext": 0.7,
}


def build(family: str, name: str) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """A network in eval mode whose scales and shifts are no plain ones and zeros, and batches for it."""
    if family == "timm":
        size, options = timm_zoo.MODELS[name]
        cut = options.get("cut", 0)
        given: dict[str, Any] = {k: v for k, v in options.items() if k != "cut"}
        model: nn.Module = timm_zoo.timm.create_model(name, pretrained=False, num_classes=5, **given)
        if cut:
            timm_zoo.keep_first_blocks(model, cut)
        inputs = images(size=size)
    elif family == "torchvision":
        make, size = torchvision_zoo.MODELS[name]
        model, inputs = make(), images(size=size)
    else:
        make, inputs = transformers_zoo.MODELS[name]
        model = make()
    timm_zoo.randomize(model)
    return model.eval(), inputs


CASES = [
    (family, name, most)
    for family, table in (("timm", TIMM), ("torchvision", TORCHVISION), ("transformers", TRANSFORMERS))
    for name, most in table.items()
]


def test_there_are_enough() -> None:
    assert len({(family, name) for family, name, _ in CASES}) >= 25


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name", "most"), CASES, ids=[f"{f}-{n}" for f, n, _ in CASES])
def test_certified(family: str, name: str, most: float) -> None:
    torch.manual_seed(0)
    model, inputs = build(family, name)
    args, kwargs = inputs(2)
    program = fxc.capture(model, args, kwargs, verify=False)  # the tests of capture compare them
    plan = fxc.plan_pruning(program, 0.5, scope="local")
    pruned = plan.apply(program)
    found = plan.certify(program, pruned)
    assert found.float64 <= 1e-9 and found.float32 <= 1e-4 and found.batches == (2, 1)
    left = sum(p.numel() for p in pruned.gm.parameters())
    assert plan.parameters == (sum(p.numel() for p in program.gm.parameters()), left)
    assert left <= most * plan.parameters[0]
    pruned.verify()
    for batch in (1, 3):
        args, kwargs = inputs(batch)
        with torch.no_grad():
            dense, small = (pytree.tree_leaves(p(*args, **kwargs)) for p in (program, pruned))
        assert 1e-4 < output_error(dense, small) < float("inf"), "the removed channels meant nothing, or shapes changed"
        assert all(bool(torch.isfinite(y).all()) for y in small)
