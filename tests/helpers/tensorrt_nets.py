"""Small networks of the known families, each with what it takes, for the tests of the TensorRT target."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.densenet import _DenseBlock
from torchvision.models.efficientnet import MBConv, MBConvConfig
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.models.shufflenetv2 import InvertedResidual as Shuffle
from torchvision.models.vision_transformer import VisionTransformer

from fxcompress.api import default_passes
from fxcompress.capture import capture
from fxcompress.engines import target
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass
from fxcompress.passes import Cast, QuantizeWeights
from fxcompress.pipeline import Pipeline

PRECISIONS = ("int8", "fp16", "int4")


class ResNet(nn.Module):
    """ResNet-50's stem, a bottleneck with a projection and one without, ResNet-18's block, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        shortcut = nn.Sequential(conv1x1(16, 32), nn.BatchNorm2d(32))
        self.blocks = nn.Sequential(Bottleneck(16, 8, downsample=shortcut), Bottleneck(32, 8), BasicBlock(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))  # type: ignore[no-any-return]


class Vision(nn.Module):
    """Blocks between a stem and a classifier."""

    def __init__(self, blocks: nn.Module, channels: int, width: int) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, channels, 3, 2, 1), blocks, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


class LiteBlock(nn.Module):
    """EfficientNet-Lite's block: TensorFlow's padding in front, ReLU6, no squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.down = nn.Conv2d(32, 32, 1, bias=False), nn.Conv2d(32, 32, 3, 2, groups=32, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (32, 32, 32))
        self.project = nn.Conv2d(32, 32, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norms[0](self.expand(x)))
        x = F.relu6(self.norms[1](self.down(F.pad(x, (0, 1, 0, 1)))))
        return self.norms[2](self.project(x))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Down and up again: transposed convolution, nearest upsampling, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
        self.up, self.join = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(48, 16, 3, padding=1)
        self.side, self.last = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(x))
        b = F.relu(self.second(a))
        c = F.interpolate(F.relu(self.side(b)), scale_factor=2.0, mode="nearest")
        return self.last(F.relu(self.join(torch.cat([F.relu(self.up(b)), a, c], 1))))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Convolutions over time, a bidirectional LSTM, a classifier: a speech model."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv1d(32, 32, 3, padding=1), nn.GELU())
        self.lstm = nn.LSTM(32, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.features(x).transpose(1, 2))
        return self.head(y)  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """MLP-Mixer: linear layers over tokens and over features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.tokens = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.features = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.features(self.norm2(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """timm's attention: one linear layer for query, key and value, cut by reshaping, and its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return x + self.proj(y)  # type: ignore[no-any-return]


_SIZES: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "use_cache": False}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=50, **_SIZES, intermediate_size=64, max_position_embeddings=16))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, use_cache=False))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, **_SIZES, num_key_value_heads=1, intermediate_size=64, max_position_embeddings=16)
    )


def _efficientnet() -> nn.Module:
    blocks = [MBConv(MBConvConfig(2, 3, 1, 32, 32, 1), 0.0, nn.BatchNorm2d) for _ in range(2)]
    return Vision(nn.Sequential(*blocks), 32, 32)


def _mobilenet() -> nn.Module:
    return Vision(nn.Sequential(InvertedResidual(32, 32, 1, 2), InvertedResidual(32, 32, 1, 2)), 32, 32)


def _vit() -> nn.Module:
    return VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=16)


IMAGE = (3, 32, 32)
#: Name -> how it is made, and shape of one sample: of an image, a sequence of vectors, or ``(length,)`` for token ids.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (ResNet, IMAGE),
    "mobilenet_v2": (_mobilenet, IMAGE),
    "efficientnet_lite": (lambda: Vision(LiteBlock(), 32, 32), IMAGE),
    "efficientnet": (_efficientnet, IMAGE),
    "densenet": (lambda: Vision(_DenseBlock(2, 32, 2, 16, 0.0), 32, 64), IMAGE),
    "shufflenet": (lambda: Vision(nn.Sequential(Shuffle(32, 64, 2), Shuffle(64, 64, 1)), 32, 64), IMAGE),
    "convnext": (lambda: Vision(CNBlock(32, 1.0, 0.0), 32, 32), IMAGE),
    "unet": (UNet, IMAGE),
    "vit": (_vit, IMAGE),
    "attention": (Attention, (8, 32)),
    "mixer": (Mixer, (32, 32)),
    "bert": (_bert, (8,)),
    "gpt2": (_gpt2, (8,)),
    "llama": (_llama, (8,)),
    "lstm": (Recurrent, (16, 24)),
}


@cache
def net(name: str) -> nn.Module:
    """A network with random weights and BatchNorm statistics that are not the identity."""
    torch.manual_seed(0)
    model = NETS[name][0]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) * 0.1
            module.running_var = torch.rand(module.num_features) + 0.5
        if isinstance(module, nn.Linear) and not module.weight.any():  # a ViT's head begins with zeros
            nn.init.normal_(module.weight, std=0.1)
    return model


def samples(name: str, count: int, seed: int = 0) -> Tensor | dict[str, Tensor]:
    """A batch for a network."""
    generator = torch.Generator().manual_seed(seed)
    shape = NETS[name][1]
    if len(shape) > 1:
        return torch.randn(count, *shape, generator=generator)
    return {"input_ids": torch.randint(0, 50, (count, *shape), generator=generator)}


@cache
def captured(name: str) -> Program:
    batch = samples(name, 2)
    model = net(name)
    return capture(model, (), batch) if isinstance(batch, dict) else capture(model, (batch,))


@cache
def plain(name: str) -> Program:
    """The float32 program, fused."""
    return _run(name, captured(name), default_passes(quantize=False))


@cache
def simulated(name: str, precision: str) -> Program:
    """The program of one precision: ``int8``, ``fp16``, ``bf16``, ``int4`` (weights, the rest in fp16), ``int8+fp16``."""
    passes: tuple[Pass, ...] = {
        "float32": (),
        "int8": default_passes(quantize=True)[-1:],
        "fp16": (Cast(),),
        "bf16": (Cast("bf16"),),
        "int4": (Cast(), QuantizeWeights(bits=4, group_size=32, fit="ignore")),
        "int8+fp16": (*default_passes(quantize=True)[-1:], Cast()),
        "int8+bf16": (*default_passes(quantize=True)[-1:], Cast("bf16")),
    }[precision]
    return _run(name, plain(name), passes)


def _run(name: str, program: Program, passes: tuple[Pass, ...]) -> Program:
    context = Context(scheme=target("tensorrt").scheme(), calibration=[samples(name, 4, 1)])
    return Pipeline(passes=passes)(program, context).program
