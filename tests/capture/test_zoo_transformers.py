"""transformers families with tiny random configurations, called by keyword as their users do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxcompress.capture import capture
from fxcompress.errors import CaptureError
from tests.helpers.capture_checks import Inputs, assert_same_outputs, check_capture, functions, layer_types

T = pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ENCODER = {**TEXT, "max_position_embeddings": 64}
DECODER = {
    **ENCODER,
    "num_key_value_heads": 2,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT = {"vocab_size": 99, "n_layer": 2, "n_head": 4, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
}
SPEECH = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "decoder_attention_heads": 4,
}


def text(batch: int) -> Inputs:
    """Token ids with a padded tail in every second row."""
    mask = torch.ones(batch, 8, dtype=torch.long)
    mask[1::2, 6:] = 0
    return (), {"input_ids": torch.randint(3, 99, (batch, 8)), "attention_mask": mask}


def image(batch: int) -> Inputs:
    return (), {"pixel_values": torch.randn(batch, 3, 32, 32)}


def image_and_text(batch: int) -> Inputs:
    return (), {**text(batch)[1], **image(batch)[1]}


MODELS: dict[str, tuple[Callable[[], Any], Callable[[int], Inputs]]] = {
    "bert": (lambda: T.BertForSequenceClassification(T.BertConfig(**ENCODER)), text),
    "distilbert": (
        lambda: T.DistilBertForMaskedLM(
            T.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)
        ),
        text,
    ),
    "roberta": (lambda: T.RobertaForTokenClassification(T.RobertaConfig(**ENCODER)), text),
    "albert": (lambda: T.AlbertModel(T.AlbertConfig(**ENCODER, embedding_size=16)), text),
    "mpnet": (lambda: T.MPNetModel(T.MPNetConfig(**ENCODER)), text),
    "deberta_v2": (
        lambda: T.DebertaV2Model(T.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"])),
        text,
    ),
    "gpt2": (lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT, n_embd=32, n_positions=64)), text),
    "bloom": (lambda: T.BloomForCausalLM(T.BloomConfig(**GPT, hidden_size=32)), text),
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**DECODER)), text),
    "qwen2": (lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**DECODER, tie_word_embeddings=True)), text),
    "mistral": (lambda: T.MistralForCausalLM(T.MistralConfig(**DECODER, sliding_window=4)), text),
    "gemma": (lambda: T.GemmaForCausalLM(T.GemmaConfig(**DECODER, head_dim=8)), text),
    "phi": (lambda: T.PhiForCausalLM(T.PhiConfig(**DECODER)), text),
    "t5": (
        lambda: T.T5EncoderModel(T.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
        text,
    ),
    "bart": (
        lambda: T.BartModel(
            T.BartConfig(
                **{k: v for k, v in SPEECH.items() if k != "num_mel_bins"},
                vocab_size=99,
                decoder_layers=1,
                decoder_ffn_dim=64,
                max_position_embeddings=64,
                use_cache=False,
            )
        ),
        lambda batch: ((), {**text(batch)[1], "decoder_input_ids": torch.randint(3, 99, (batch, 5))}),
    ),
    "mixtral": (lambda: T.MixtralForCausalLM(T.MixtralConfig(**DECODER, num_local_experts=2)), text),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**VISION, patch_size=8)), image),
    "dinov2": (lambda: T.Dinov2Model(T.Dinov2Config(**VISION, patch_size=8)), image),
    "swin": (
        lambda: T.SwinForImageClassification(
            T.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4)
        ),
        image,
    ),
    "resnet": (
        lambda: T.ResNetForImageClassification(
            T.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck")
        ),
        image,
    ),
    "convnext": (
        lambda: T.ConvNextForImageClassification(T.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)),
        image,
    ),
    "clip": (
        lambda: T.CLIPModel(
            T.CLIPConfig(
                text_config={**ENCODER, "eos_token_id": 98, "bos_token_id": 97},
                vision_config={**VISION, "patch_size": 8},
                projection_dim=16,
            )
        ),
        image_and_text,
    ),
    "whisper": (
        lambda: (
            T.WhisperModel(T.WhisperConfig(**SPEECH, vocab_size=99, max_source_positions=20, pad_token_id=0)).encoder
        ),
        lambda batch: ((), {"input_features": torch.randn(batch, 16, 40)}),
    ),
    "wav2vec2": (
        lambda: T.Wav2Vec2Model(
            T.Wav2Vec2Config(
                **TEXT,
                conv_dim=(16, 16),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            )
        ),
        lambda batch: ((), {"input_values": torch.randn(batch, 400)}),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_transformers(name: str) -> None:
    make, inputs = MODELS[name]
    program = check_capture(make(), inputs, again=name in ("bert", "llama"))
    left = {"conv2d", "conv1d", "linear", "addmm", "embedding", "layer_norm", "batch_norm"} & set(functions(program))
    assert left == ({"conv1d"} if name == "wav2vec2" else set())  # its positional convolution computes the weight


@pytest.mark.filterwarnings("ignore")
def test_layers_of_a_causal_model() -> None:
    """GPT-2: every Conv1D is a layer of its own kind, and the head is tied to the embedding under both names."""
    model = MODELS["gpt2"][0]()
    program = capture(model, *text(1))
    kinds = layer_types(program)
    assert [k for p, k in kinds.items() if "c_attn" in p or "c_fc" in p] == ["TransposedLinear"] * 4
    assert kinds["lm_head"] == "Linear" and kinds["transformer.wte"] == "Embedding"
    assert program.gm.get_parameter("lm_head.weight") is program.gm.get_parameter("transformer.wte.weight")


@pytest.mark.filterwarnings("ignore")
def test_key_cache_among_the_outputs_is_refused_with_the_way_out() -> None:
    """transformers' default for a causal model."""
    model = T.LlamaForCausalLM(T.LlamaConfig(**{**DECODER, "use_cache": True}))
    with pytest.raises(CaptureError) as caught:
        capture(model, *text(1))
    assert caught.value.id == "FXC-CAPTURE-008" and "past_key_values" in caught.value.where
    assert "model.config.use_cache = False" in caught.value.fix


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_dynamic_sequence_length(name: str) -> None:
    make, _ = MODELS[name]
    model = make().eval()
    auto = torch.export.Dim.AUTO
    shapes = {key: {0: auto, 1: auto} for key in ("input_ids", "attention_mask")}
    program = capture(model, *text(2), dynamic_shapes=shapes)
    for batch, length in ((1, 8), (3, 5), (2, 17)):
        kwargs = {
            "input_ids": torch.randint(3, 99, (batch, length)),
            "attention_mask": torch.ones(batch, length).long(),
        }
        with torch.no_grad():
            assert_same_outputs(model(**kwargs), program(**kwargs), exact=False)
