"""Networks of the pruning benchmark, at full size with random weights: torchvision, timm, transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from benchmarks import torchvision_cpu

__all__ = ["ZOO", "Entry", "jitter"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        name: ``source/name``.
        family: ``cnn``, ``transformer``, ``hierarchical``, ``hybrid``, ``mlp``, ``detection``, ``segmentation``,
            ``video`` or ``text``.
        build: Gives the network in eval mode.
        inputs: Batch size -> ``(args, kwargs)``.
        width: Also prune the dimensions that norms take their statistics over.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    width: bool = False


def jitter(model: nn.Module) -> nn.Module:
    """Small random numbers onto biases, scales and running means, which initialization leaves at 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.05 * torch.randn_like(buffer))
    return model.eval()


def images(size: int, *more: int) -> Callable[[int], Inputs]:
    """Batches of RGB images, or of clips with ``more`` leading dimensions."""
    return lambda batch: ((torch.randn(batch, 3, *more, size, size),), {})


# ------------------------------------------------------------------------------------------------ torchvision
_TORCHVISION: Final = {
    "cnn": "alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 googlenet inception_v3 "
    "squeezenet1_1 shufflenet_v2_x1_0 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet1_0 efficientnet_b0 "
    "efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny",
    "transformer": "vit_b_16 vit_b_32",
    "hierarchical": "swin_t swin_v2_t",
    "hybrid": "maxvit_t",
    "segmentation": "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large",
    "detection": "retinanet_resnet50_fpn fcos_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large "
    "fasterrcnn_resnet50_fpn",
    "video": "r3d_18 r2plus1d_18",
}
_SIZES: Final = {"inception_v3": 299, "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320, "r3d_18": 112}


class Detector(nn.Module):
    """Backbone and heads of a torchvision detector: everything before boxes are decoded and sorted out."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head: nn.Module = detector.head if hasattr(detector, "head") else detector.rpn.head

    def forward(self, x: Tensor) -> Any:
        """Images [n, 3, height, width] -> what the heads give for every level."""
        features = self.backbone(x)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        return self.head(features)


def _torchvision(name: str, family: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torchvision_cpu.prepare()
        from torchvision.models import get_model

        torch.manual_seed(0)
        options: dict[str, Any] = {"weights": None}
        options |= {"weights_backbone": None} if family in ("detection", "segmentation") else {}
        options |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = cast(nn.Module, get_model(name, **options))
        return jitter(Detector(model) if family == "detection" else model)

    return build


def _of_torchvision() -> list[Entry]:
    return [
        Entry(
            f"torchvision/{name}",
            family,
            _torchvision(name, family),
            images(_SIZES.get(name, 224), *((8,) if family == "video" else ())),
        )
        for family, names in _TORCHVISION.items()
        for name in names.split()
    ]


# ------------------------------------------------------------------------------------------------------- timm
_TIMM: Final = {
    "cnn": "resnest14d resnetv2_50 ecaresnet26t skresnet18 res2net50_26w_4s resnext26ts gcresnext26ts convnext_atto "
    "convnextv2_atto efficientnet_lite0 tf_efficientnetv2_b0 mobilenetv4_conv_small mixnet_s fbnetc_100 ghostnet_100 "
    "ghostnetv2_100 hardcorenas_a lcnet_050 tinynet_e rexnet_100 repvgg_a0 repghostnet_050 mobileone_s0 nfnet_l0 "
    "hgnetv2_b0 dla34 dpn68 xception41 inception_resnet_v2 inception_next_atto cspresnet50 cspdarknet53 "
    "ese_vovnet19b_dw selecsls42b hrnet_w18_small starnet_s1 mambaout_femto regnetz_b16 rdnet_tiny fasternet_t0 "
    "mobilenetv1_100",
    "transformer": "vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 vit_relpos_small_patch16_224 "
    "beit_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224 xcit_nano_12_p16_224 crossvit_tiny_240 "
    "tnt_s_patch16_224 volo_d1_224",
    "hierarchical": "swinv2_cr_tiny_ns_224 pvt_v2_b0 twins_svt_small twins_pcpvt_small mvitv2_tiny hiera_tiny_224 "
    "davit_tiny focalnet_tiny_srf gcvit_xxtiny nest_tiny pit_ti_224",
    "hybrid": "botnet26t_256 lambda_resnet26t halonet26t mobilenetv4_hybrid_medium edgenext_xx_small nextvit_small "
    "efficientvit_b0 efficientvit_m0 efficientformer_l1 efficientformerv2_s0 levit_128s coat_tiny coatnet_0_rw_224 "
    "mobilevit_xxs mobilevitv2_050 fastvit_t8 repvit_m0_9 tiny_vit_5m_224 visformer_tiny convit_tiny shvit_s1 "
    "swiftformer_xs caformer_s18 sequencer2d_s",
    "mlp": "mixer_s32_224 gmlp_s16_224 gmixer_12_224 resmlp_12_224 convmixer_768_32 poolformer_s12 poolformerv2_s12 "
    "convformer_s18",
}
_TIMM_SIZES: Final = {"crossvit_tiny_240": 240, "botnet26t_256": 256, "halonet26t": 256, "lambda_resnet26t": 256}


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torchvision_cpu.prepare()
        import timm

        torch.manual_seed(0)
        return jitter(timm.create_model(name, pretrained=False))

    return build


def _of_timm() -> list[Entry]:
    return [
        Entry(f"timm/{name}", family, _timm(name), images(_TIMM_SIZES.get(name, 224)))
        for family, names in _TIMM.items()
        for name in names.split()
    ]


# ----------------------------------------------------------------------------------------------- transformers
_TEXT: Final = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
    "max_position_embeddings": 128,
}
_DECODER: Final = {**_TEXT, "num_key_value_heads": 4, "use_cache": False, "pad_token_id": 0}
_VISION: Final = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 768,
    "image_size": 112,
}

#: Name -> (class, configuration class, its options, kind of input).
_TRANSFORMERS: Final[dict[str, tuple[str, str, dict[str, Any], str]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT, "text"),
    "roberta": ("RobertaForTokenClassification", "RobertaConfig", _TEXT, "text"),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**_TEXT, "embedding_size": 128}, "text"),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**_TEXT, "embedding_size": 64}, "text"),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 1000, "dim": 256, "n_layers": 4, "n_heads": 8, "hidden_dim": 1024},
        "text",
    ),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", _TEXT, "text"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 1000, "n_embd": 256, "n_layer": 4, "n_head": 8, "use_cache": False},
        "text",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_TEXT, "use_cache": False}, "text"),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{k: v for k, v in _TEXT.items() if k != "intermediate_size"},
            "ffn_dim": 1024,
            "word_embed_proj_dim": 256,
            "use_cache": False,
        },
        "text",
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, "text"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_DECODER, "tie_word_embeddings": True}, "text"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 32}, "text"),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 8}, "text"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 32}, "text"),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER, "text"),
    "t5_encoder": (
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 1000, "d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 4, "num_heads": 8},
        "text",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_VISION, "patch_size": 16}, "image"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**_VISION, "patch_size": 14}, "image"),
    "whisper_encoder": (
        "WhisperModel",
        "WhisperConfig",
        {
            "vocab_size": 1000,
            "d_model": 256,
            "encoder_layers": 4,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 1024,
            "num_mel_bins": 80,
            "max_source_positions": 100,
            "decoder_layers": 1,
            "pad_token_id": 0,
        },
        "speech",
    ),
}


def _transformers(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torchvision_cpu.prepare()
        import transformers

        kind, config, options, inputs = _TRANSFORMERS[name]
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**options))
        return jitter(model.encoder if inputs == "speech" else model)

    return build


def _tokens(batch: int) -> Inputs:
    mask = torch.ones(batch, 32, dtype=torch.long)
    mask[1::2, 24:] = 0
    return (), {"input_ids": torch.randint(3, 1000, (batch, 32)), "attention_mask": mask}


def _pixels(batch: int) -> Inputs:
    return (), {"pixel_values": torch.randn(batch, 3, 112, 112)}


def _spectra(batch: int) -> Inputs:
    return (torch.randn(batch, 80, 200),), {}


_KINDS: Final = {"text": _tokens, "image": _pixels, "speech": _spectra}


def _of_transformers(width: bool) -> list[Entry]:
    return [
        Entry(
            f"transformers/{name}{'+width' * width}",
            "text" if kind == "text" else "transformer",
            _transformers(name),
            _KINDS[kind],
            width,
        )
        for name, (_, _, _, kind) in _TRANSFORMERS.items()
    ]


ZOO: Final = {e.name: e for e in (*_of_torchvision(), *_of_timm(), *_of_transformers(False), *_of_transformers(True))}
