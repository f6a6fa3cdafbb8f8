"""MODEL arguments: what each form gives, and what a wrong one says."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim

from fxcompress.capture import capture
from fxcompress.errors import MissingRuntimeError, ModelSpecError, UsageError
from fxcompress.modelspec import FORMS, parse_shape, resolve

FACTORY = """
import torch
from torch import nn
from helper import WIDTH

def build():
    return nn.Linear(WIDTH, 3).train(), torch.ones(2, WIDTH)

def plain():
    return nn.Linear(WIDTH, 3)

def named():
    return plain(), {"input": torch.ones(2, WIDTH)}

def wrong():
    return "a string"

def broken():
    return plain().no_such_attribute

def leaves():
    raise SystemExit(7)

ready = plain()
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with factories beside a helper that it imports."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    (tmp_path / "helper.py").write_text("WIDTH = 5\n")
    file = tmp_path / "model.py"
    file.write_text(FACTORY)
    return file


# ---------------------------------------------------------------------------------------------------------------- py:
def test_py_factory_with_example(source: Path) -> None:
    found = resolve(f"py:{source}:build")
    assert isinstance(found.module, nn.Linear) and not found.module.training
    assert found.kind == "py" and found.name == "Linear" and found.has_example
    assert torch.equal(found.args[0], torch.ones(2, 5)) and not found.kwargs


def test_py_other_returns(source: Path) -> None:
    assert not resolve(f"py:{source}:plain").has_example
    assert list(resolve(f"py:{source}:named").kwargs) == ["input"]
    assert isinstance(resolve(f"py:{source}:ready").module, nn.Linear)


def test_py_weights_follow_the_seed(source: Path) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, second = (resolve(f"py:{source}:plain", seed=s).require_module().weight for s in (0, 0))
    assert torch.equal(first, second)
    assert not torch.equal(first, resolve(f"py:{source}:plain", seed=1).require_module().weight)
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state is left alone"


def test_py_failures_name_the_line(source: Path) -> None:
    with pytest.raises(ModelSpecError, match="no_such_attribute") as caught:
        resolve(f"py:{source}:broken")
    line = FACTORY.splitlines().index("    return plain().no_such_attribute") + 1
    assert f"{source}:{line}" in caught.value.where or "torch/nn/modules" in caught.value.where
    with pytest.raises(ModelSpecError, match="SystemExit: 7"):
        resolve(f"py:{source}:leaves")
    bad = source.with_name("bad.py")
    bad.write_text("import torch\ndef broken(:\n")
    with pytest.raises(ModelSpecError, match="SyntaxError") as caught:
        resolve(f"py:{bad}:f")
    assert caught.value.where == f"{bad}:2"


def test_py_wrong_names(source: Path) -> None:
    with pytest.raises(ModelSpecError, match=r"did you mean py:.*:build\?"):
        resolve(f"py:{source}:biuld")
    with pytest.raises(ModelSpecError, match="it has: build, plain, named"):
        resolve(f"py:{source}:zzz")
    with pytest.raises(ModelSpecError, match="which function"):
        resolve(f"py:{source}")
    with pytest.raises(ModelSpecError, match="returned str"):
        resolve(f"py:{source}:wrong")
    with pytest.raises(ModelSpecError, match="there is no file"):
        resolve("py:nowhere.py:f")


# -------------------------------------------------------------------------------------------------------------- timm:
def test_timm_architecture() -> None:
    pytest.importorskip("timm")
    found = resolve("timm:mobilenetv3_small_050")
    assert found.args[0].shape == (1, 3, 224, 224)
    assert found.preprocessing is not None and found.preprocessing.mean == (0.485, 0.456, 0.406)
    assert any("random weights" in note for note in found.notes)
    with pytest.raises(ModelSpecError, match="did you mean timm:resnet18"):
        resolve("timm:resnet18x")


def test_timm_local_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    model = timm.create_model("mobilenetv3_small_050", num_classes=7).eval()
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    found = resolve(f"timm:mobilenetv3_small_050@{file}")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.require_module()(x), model(x)), "seven classes, from the file"
    assert not found.notes
    save_file({"conv_stem.weight": torch.ones(1)}, file)
    with pytest.raises(ModelSpecError, match="do not fit"):
        resolve(f"timm:mobilenetv3_small_050@{file}")
    file.write_bytes(b"nonsense")
    with pytest.raises(ModelSpecError, match="cannot be read"):
        resolve(f"timm:mobilenetv3_small_050@{file}")
    with pytest.raises(ModelSpecError, match="a pickle runs code"):
        resolve("timm:mobilenetv3_small_050@weights.pth")


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingRuntimeError, match="pip install timm"):
        resolve("timm:resnet18")


# ---------------------------------------------------------------------------------------------------------------- hf:
def hf_configs() -> dict[str, object]:
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    image = text | {"image_size": 16, "patch_size": 8}
    return {
        "BertForSequenceClassification": transformers.BertConfig(vocab_size=40, max_position_embeddings=20, **text),
        "LlamaForCausalLM": transformers.LlamaConfig(vocab_size=40, **text),
        "ViTForImageClassification": transformers.ViTConfig(**image),
        "T5Model": transformers.T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2),
        "CLIPModel": transformers.CLIPConfig(
            text_config=text | {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}, vision_config=image
        ),
        "WhisperModel": transformers.WhisperConfig(
            vocab_size=40, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=20,
            pad_token_id=0, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2,
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("BertForSequenceClassification", {"input_ids": (1, 20), "attention_mask": (1, 20)}),
        ("LlamaForCausalLM", {"input_ids": (1, 128), "attention_mask": (1, 128)}),
        ("ViTForImageClassification", {"pixel_values": (1, 3, 16, 16)}),
        ("T5Model", {"input_ids": (1, 128), "attention_mask": (1, 128), "decoder_input_ids": (1, 16)}),
        ("CLIPModel", {"input_ids": (1, 77), "attention_mask": (1, 77), "pixel_values": (1, 3, 16, 16)}),
        ("WhisperModel", {"input_features": (1, 80, 40), "decoder_input_ids": (1, 16)}),
    ],
)
def test_hf_folder(name: str, inputs: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    """The class of the config, the saved weights, and example inputs that the model accepts."""
    config = hf_configs()[name]
    import transformers

    torch.manual_seed(4)
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(tmp_path)
    found = resolve(f"hf:{tmp_path}")
    assert type(found.module).__name__ == name and not found.notes
    assert {k: tuple(v.shape) for k, v in found.kwargs.items()} == inputs
    with torch.no_grad():
        got, expected = found.require_module()(**found.kwargs)[0], model(**found.kwargs)[0]
    assert torch.equal(got, expected)


def test_hf_without_weights_and_with_statistics(tmp_path: Path) -> None:
    hf_configs()["ViTForImageClassification"].save_pretrained(tmp_path)  # type: ignore[attr-defined]
    statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "size": {"shortest_edge": 20}}
    statistics |= {"crop_size": {"height": 16, "width": 16}, "do_center_crop": True, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    found = resolve(f"hf:{tmp_path}")
    assert any("random weights" in note for note in found.notes)
    assert found.preprocessing is not None
    assert found.preprocessing.mean == (0.5, 0.5, 0.5) and found.preprocessing.crop == 0.8
    assert found.preprocessing.interpolation == "bicubic"


def test_hf_failures(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ModelSpecError, match=r"holds no config\.json"):
        resolve(f"hf:{tmp_path}")
    foreign = {"model_type": "bert", "auto_map": {"AutoConfig": "own.Config"}, "architectures": ["Own"]}
    (tmp_path / "config.json").write_text(json.dumps(foreign | {"model_type": "no_such_type"}))
    (tmp_path / "own.py").write_text("raise RuntimeError('this code must not run')\n")
    with pytest.raises(ModelSpecError, match="transformers cannot load") as caught:
        resolve(f"hf:{tmp_path}")
    assert "must not run" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- pt2
def save_exported(path: Path) -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    args = (torch.randn(2, 3, 8, 8),)
    torch.export.save(torch.export.export(model, args, dynamic_shapes=({0: Dim.AUTO},)), path)
    return model


def test_pt2_program(tmp_path: Path) -> None:
    model = save_exported(tmp_path / "net.pt2")
    found = resolve(str(tmp_path / "net.pt2"))
    assert found.kind == "pt2" and found.name == "net" and found.args[0].shape == (2, 3, 8, 8)
    program = capture(found.require_module(), found.args)
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(program(x), model(x)), "another batch"
    assert set(program.gm.state_dict()) == set(model.state_dict())


def test_pt2_keeps_its_fixed_and_free_sizes(tmp_path: Path) -> None:
    """A graph exported for one batch may hold that number: it must not be called with another one."""
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(1, 4),)), tmp_path / "fixed.pt2")
    fixed = resolve(str(tmp_path / "fixed.pt2"))
    assert fixed.fixed_batch == 1 and fixed.dynamic_shapes == (None,)
    assert any("batch 1 only" in note for note in fixed.notes)
    program = capture(fixed.require_module(), fixed.args, dynamic_shapes=fixed.dynamic_shapes)
    assert program.placeholders()[0].meta["val"].shape == (1, 4)
    save_exported(tmp_path / "free.pt2")
    free = resolve(str(tmp_path / "free.pt2"))
    assert free.fixed_batch is None and free.dynamic_shapes == ({0: Dim.AUTO},)


def test_pt2_with_keyword_inputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    kwargs = {"b": torch.randn(2, 3)}
    shapes = {"a": {0: Dim.AUTO}, "b": {0: Dim.AUTO}}
    exported = torch.export.export(Two(), (torch.randn(2, 3),), kwargs, dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "two.pt2")
    found = resolve(str(tmp_path / "two.pt2"))
    program = capture(found.require_module(), found.args, found.kwargs, dynamic_shapes=found.dynamic_shapes)
    x = torch.randn(5, 3)
    assert torch.equal(program(x, b=x), x + x)


def test_pt2_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "net.pt2"
    with pytest.raises(ModelSpecError, match="there is no such file"):
        resolve(str(file))
    torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(ModelSpecError, match="not an exported program"):
        resolve(str(file))
    file.write_bytes(b"nonsense")
    with pytest.raises(ModelSpecError, match=r"not a \.pt2 archive"):
        resolve(str(file))


def test_pt2_with_pickles_is_refused(tmp_path: Path) -> None:
    save_exported(tmp_path / "net.pt2")
    with zipfile.ZipFile(tmp_path / "net.pt2") as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'"use_pickle": false', b'"use_pickle": true'))
    with pytest.raises(ModelSpecError, match="pickled tensors"):
        resolve(str(tmp_path / "bad.pt2"))


# --------------------------------------------------------------------------------------------------- everything else
def test_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    found = resolve(str(tmp_path))
    assert found.kind == "folder" and found.folder == tmp_path
    with pytest.raises(ModelSpecError, match="saved engine"):
        found.require_module()


@pytest.mark.parametrize("spec", ["model.pt", "model.pth", "runs/last.ckpt"])
def test_pickles_are_refused_with_the_reason(spec: str) -> None:
    with pytest.raises(ModelSpecError, match="a pickle runs code when it is opened"):
        resolve(spec)


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("resnet18", "timm:resnet18"),
        ("tim:resnet18", "timm:resnet18"),
        ("TIMM:resnet18", "timm:resnet18"),
        ("pu:model.py:build", "py:model.py:build"),
        ("model.py:build", "py:model.py:build"),
    ],
)
def test_nearest_form(spec: str, near: str) -> None:
    with pytest.raises(ModelSpecError) as caught:
        resolve(spec)
    assert f"did you mean {near}?" in caught.value.fix
    assert all(form in caught.value.fix for form in FORMS)
    assert caught.value.exit_code == 2


def test_nearest_form_of_files(source: Path) -> None:
    with pytest.raises(ModelSpecError, match=r"did you mean py:.*model\.py:FACTORY"):
        resolve(str(source))
    save_exported(source.with_name("network.pt2"))
    with pytest.raises(ModelSpecError, match=r"did you mean .*network\.pt2"):
        resolve(str(source.with_name("netwrk.pt2")))
    (source.parent / "config.json").write_text("{}")
    with pytest.raises(ModelSpecError, match="did you mean hf:"):
        resolve(str(source.parent))
    with pytest.raises(ModelSpecError, match="fxcompress benchmark"):
        resolve("model.onnx")


@pytest.mark.parametrize("spec", ["", "py:", "timm:", ":", "a b/c", "https://example.com/model"])
def test_nonsense_lists_the_forms(spec: str) -> None:
    with pytest.raises(ModelSpecError, match="MODEL is one of"):
        resolve(spec)


def test_input_shapes(source: Path) -> None:
    found = resolve(f"py:{source}:build", input_shapes=("4,5", "1,7:int64"))
    assert [tuple(t.shape) for t in found.args] == [(4, 5), (1, 7)]
    assert [t.dtype for t in found.args] == [torch.float32, torch.int64]
    assert parse_shape("1x3x8x8").shape == (1, 3, 8, 8)
    assert set(parse_shape("50:int64").tolist()) <= {0, 1}


@pytest.mark.parametrize("text", ["", "1,,3", "a", "1,-3", "1,3:nonsense", "1,3:nn"])
def test_wrong_input_shapes(text: str) -> None:
    with pytest.raises(UsageError, match="not an input shape"):
        parse_shape(text)
