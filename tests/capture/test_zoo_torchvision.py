"""Every classification family of torchvision, few blocks each, random weights."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from tests.helpers.capture_checks import assert_same_outputs, check_capture, functions, images

models = pytest.importorskip("torchvision.models", reason="needs torchvision", exc_type=ImportError)


def vgg() -> nn.Module:
    with torch.device("meta"):  # the head alone has 120 million weights
        model = models.vgg11_bn()
    model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(512 * 49, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 5))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def resnet(**options: int) -> nn.Module:
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 2, 1], num_classes=5, **options)


def mobilenet_v3() -> nn.Module:
    conf = partial(models.mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    setting = [
        conf(16, 3, 16, 16, True, "RE", 2),
        conf(16, 3, 32, 24, False, "RE", 2),
        conf(24, 5, 48, 24, True, "HS", 1),
    ]
    return models.MobileNetV3(setting, 64, num_classes=5)


def efficientnet() -> nn.Module:
    conf = models.efficientnet.MBConvConfig
    setting = [conf(1, 3, 1, 16, 8, 1, 1.0, 1.0), conf(6, 3, 2, 8, 16, 2, 1.0, 1.0), conf(6, 5, 2, 16, 24, 1, 1.0, 1.0)]
    return models.EfficientNet(setting, 0.2, num_classes=5)


def efficientnet_v2() -> nn.Module:
    plain, fused = models.efficientnet.MBConvConfig, models.efficientnet.FusedMBConvConfig
    setting = [fused(1, 3, 1, 16, 8, 2), fused(4, 3, 2, 8, 16, 2), plain(4, 3, 2, 16, 24, 2, 1.0, 1.0)]
    return models.EfficientNet(
        setting, 0.2, num_classes=5, last_channel=64, norm_layer=partial(nn.BatchNorm2d, eps=1e-3)
    )


def regnet() -> nn.Module:
    parameters = models.regnet.BlockParams.from_init_params(
        depth=5, w_0=16, w_a=10.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    return models.RegNet(parameters, num_classes=5)


def convnext() -> nn.Module:
    conf = models.convnext.CNBlockConfig
    return models.ConvNeXt([conf(16, 32, 1), conf(32, 48, 2), conf(48, None, 1)], num_classes=5)


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 2, 4, 32, 64, dropout=0.1, num_classes=5)


def swin(version: int) -> nn.Module:
    options = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    if version == 2:
        parts = models.swin_transformer
        options |= {"block": parts.SwinTransformerBlockV2, "downsample_layer": parts.PatchMergingV2}
    return models.SwinTransformer(**options, num_classes=5)


def maxvit() -> nn.Module:
    return models.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.2, num_classes=5)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (partial(models.alexnet, num_classes=5), 64),
    "vgg": (vgg, 32),
    "resnet": (lambda: models.ResNet(models.resnet.BasicBlock, [1, 2, 1, 1], num_classes=5), 64),
    "resnext": (lambda: resnet(groups=32, width_per_group=4), 64),
    "wide_resnet": (lambda: resnet(width_per_group=128), 64),
    "densenet": (lambda: models.DenseNet(8, (2, 3, 2, 2), 16, num_classes=5), 64),
    "googlenet": (lambda: models.GoogLeNet(num_classes=5, init_weights=False), 64),
    "inception_v3": (lambda: models.Inception3(num_classes=5, init_weights=False), 80),
    "squeezenet": (partial(models.squeezenet1_1, num_classes=5), 64),
    "shufflenet_v2": (lambda: models.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 256], num_classes=5), 64),
    "mobilenet_v2": (lambda: models.MobileNetV2(5, 0.5, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]), 64),
    "mobilenet_v3": (mobilenet_v3, 64),
    "mnasnet": (partial(models.mnasnet0_5, num_classes=5), 64),
    "efficientnet": (efficientnet, 64),
    "efficientnet_v2": (efficientnet_v2, 64),
    "regnet": (regnet, 64),
    "convnext": (convnext, 64),
    "vit": (vit, 32),
    "swin": (lambda: swin(1), 64),
    "swin_v2": (lambda: swin(2), 64),
    "maxvit": (maxvit, 64),
}


@pytest.mark.parametrize("name", MODELS)
def test_torchvision(name: str) -> None:
    make, size = MODELS[name]
    program = check_capture(make(), images(size=size), again=name in ("resnet", "vit", "swin"))
    left = {"conv2d", "batch_norm", "layer_norm"} & set(functions(program))
    assert not left, f"operators with weights that did not become layers: {left}"
    # Swin V2 computes the bias of its projections
    assert name == "swin_v2" or "linear" not in functions(program)


@pytest.mark.parametrize("name", ["resnet", "shufflenet_v2", "mobilenet_v3", "densenet", "googlenet"])
def test_training_mode_updates_statistics_like_the_model(name: str) -> None:
    """One training step's forward: same outputs and running statistics as the eager model (dropout off)."""
    make, size = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name == "googlenet":
        model.aux_logits, model.aux1, model.aux2 = False, None, None  # a branch that only training takes
    program = capture(copy.deepcopy(model), (torch.randn(1, 3, size, size),))
    program.gm.train()
    x = torch.randn(4, 3, size, size)
    assert_same_outputs(model.train()(x), program(x))
    state = program.gm.state_dict()
    moved = 0
    for key, value in model.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)
        moved += key.endswith("num_batches_tracked") and int(value) == 1
    assert moved == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
