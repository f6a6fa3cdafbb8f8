"""timm families: convolutional, transformer, hybrid and MLP, few blocks each, random weights."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.capture_checks import check_capture, functions, images

pytest.importorskip("torchvision", reason="timm needs torchvision", exc_type=ImportError)
timm = pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)

#: Name in timm -> (input size, options that make it small). ``cut`` keeps the first blocks of every stage.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    # convolutional
    "resnet18": (64, {"layers": (1, 1, 1, 1)}),
    "resnetv2_50": (64, {"layers": (1, 1, 1, 1)}),
    "convnext_atto": (64, {"depths": (1, 1, 1, 1)}),
    "efficientnet_lite0": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "repvgg_a0": (64, {}),
    "nfnet_l0": (64, {"depths": (1, 1, 1, 1)}),
    "lcnet_050": (64, {}),
    "res2net50_26w_4s": (64, {"layers": (1, 1, 1, 1)}),
    "skresnet18": (64, {"layers": (1, 1, 1, 1)}),
    "inception_next_atto": (64, {"depths": (1, 1, 1, 1)}),
    "starnet_s1": (64, {"depths": (1, 1, 1, 1)}),
    "mambaout_femto": (64, {"depths": (1, 1, 1, 1)}),
    # transformers
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "vit_relpos_small_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "beit_base_patch16_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 96, "num_heads": 4}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, "depth": 2}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}),
    "pvt_v2_b0": (64, {"depths": (1, 1, 1, 1)}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "depth": 2}),
    "cait_xxs24_224": (32, {"img_size": 32, "depth": 2, "depth_token_only": 1}),
    # hybrids
    "levit_128s": (64, {"img_size": 64, "depth": (1, 1, 1)}),
    "mobilevit_xxs": (64, {"cut": 1}),
    "efficientformer_l1": (224, {"depths": (1, 1, 1, 1)}),
    "coatnet_nano_rw_224": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64, "cut": 1}),
    "fastvit_t8": (64, {"layers": (1, 1, 1, 1)}),
    # MLP and others
    "mixer_s32_224": (64, {"img_size": 64, "cut": 2}),
    "gmlp_ti16_224": (64, {"img_size": 64, "cut": 2}),
    "resmlp_12_224": (64, {"img_size": 64, "cut": 2}),
    "poolformer_s12": (64, {"cut": 1}),
    "convmixer_768_32": (64, {"cut": 2}),
}
#: These compute a weight or a bias in forward, so the operator cannot be a layer: it stays one.
COMPUTED = {
    "nfnet_l0": {"conv2d", "batch_norm"},
    "beit_base_patch16_224": {"linear"},
    "eva02_tiny_patch14_224": {"linear"},
    "swinv2_tiny_window8_256": {"linear"},
}


@pytest.mark.parametrize("name", MODELS)
def test_timm(name: str) -> None:
    size, options = MODELS[name]
    options = dict(options)
    cut = options.pop("cut", 0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **options)
    if cut:
        keep_first_blocks(model, cut)
    randomize(model)
    program = check_capture(model, images(size=size), again=False)
    left = {"conv2d", "linear", "batch_norm", "layer_norm", "group_norm"} & set(functions(program))
    assert left == COMPUTED.get(name, set())


def keep_first_blocks(model: nn.Module, count: int) -> None:
    """Drop the later blocks of every stage; a stage's first block is the one that changes the shape."""
    for module in [m for m in model.modules() if isinstance(getattr(m, "blocks", None), nn.Sequential)]:
        module.blocks = module.blocks[:count]


def randomize(model: nn.Module) -> None:
    """No zero or one where training would have left another number: a lost scale or bias must show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
