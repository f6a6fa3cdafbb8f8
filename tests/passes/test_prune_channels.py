"""PruneChannels under the contract, in pipelines, and on the way into engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.analysis import count_macs
from fxcompress.errors import CertificateError, PruneError
from fxcompress.passbase import Pass, fingerprint
from fxcompress.pipeline import Pipeline
from tests.prune.cases import images
from tests.prune.planned import example, model, program


def labelled(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator))
        for _ in range(count)
    ]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ratio": ("cnn", {"ratio": 0.5}),
    "macs": ("cnn", {"macs": 0.5, "importance": "l1"}),
    "parameters": ("block", {"parameters": 0.8, "attention": "head_dim"}),
    "width": ("block", {"ratio": 0.5, "width": True, "scope": "local"}),
    "ratios": ("cnn", {"ratios": (("fc1", 0.5), ("inner", 0.25))}),
    "globs": ("cnn", {"ratio": 0.5, "ignore": ("stem.*",), "include": ("*",), "round_to": 4, "min_channels": 4}),
    "taylor": ("cnn", {"ratio": 0.5, "importance": "taylor"}),
    "random": ("cnn", {"ratio": 0.5, "importance": "random", "seed": 7, "certify": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_contract(case: str) -> None:
    """Input untouched, normal form, metadata true, recipe round trip; the same request again changes nothing."""
    name, options = CASES[case]
    pass_ = fxc.PruneChannels(**options)
    result = fxc.check_pass(pass_, program(name), context=fxc.Context(train=labelled()))
    assert result.modified and result.error is not None and result.error > 0
    assert result.changes and all("->" in line for line in result.changes)
    before, after = result.metrics["macs"]
    assert (before, after) == (count_macs(program(name)), count_macs(result.program))
    certificate = result.metrics.get("certificate")
    assert (certificate is not None) == pass_.certify
    assert certificate is None or (certificate["float64"] <= 1e-9 and certificate["batches"] == [2, 1])
    assert Pass.from_dict(pass_.to_dict()) == pass_


def test_it_is_the_plan() -> None:
    plan = fxc.plan_pruning(program("cnn"), 0.5, ignore=["outer"])
    result = fxc.PruneChannels(ratio=0.5, ignore=("outer",))(program("cnn"))
    expected = plan.apply(program("cnn"))
    assert fingerprint(result.program) == fingerprint(expected) or result.program.text() == expected.text()
    ours, theirs = result.program.gm.state_dict(), expected.gm.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert result.program.history == [plan.to_dict()]


def test_the_same_request_again_is_met_and_another_is_not() -> None:
    first = fxc.PruneChannels(ratio=0.4)(program("cnn")).program
    again = fxc.PruneChannels(ratio=0.4)(first)
    assert not again.modified and again.notes == ["nothing to prune: this very request was met before"]
    further = fxc.PruneChannels(ratio=0.3)(first)
    assert further.modified and len(further.program.history) == 2
    assert further.metrics["macs"][0] == count_macs(first)


def test_gradients_are_needed_for_taylor() -> None:
    pass_ = fxc.PruneChannels(ratio=0.5, importance="taylor")
    with pytest.raises(PruneError, match=r"FXC-PRUNE-011(.|\n)*train=loader"):
        pass_(program("cnn"))
    with pytest.raises(PruneError, match="needs training data"):
        fxc.PruneChannels(ratio=0.5, importance="activation")(program("cnn"))
    own = fxc.capture(model("cnn"), example("cnn"))
    own.gm(*example("cnn")).square().sum().backward()
    by_hand = pass_(own)  # gradients that are there already will do
    given = pass_(program("cnn"), fxc.Context(train=labelled()))
    assert by_hand.modified and given.modified


def test_a_loss_of_ones_own() -> None:
    seen = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        seen.append(len(batch))
        return output[:, 0].sum()

    pass_ = fxc.PruneChannels(ratio=0.5, importance="taylor")
    own, usual = (pass_(program("cnn"), fxc.Context(train=labelled(), loss=f)).program.history[0] for f in (loss, None))
    assert seen and own["removed"] != usual["removed"]


def test_a_failed_proof_stops_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxcompress.prune import surgery

    def cut(found: Any, removed: Any) -> Any:
        pruned, notes = surgery.cut_program(found, removed)
        layer: Any = pruned.gm.get_submodule("fc1")
        layer.weight = nn.Parameter(layer.weight.detach() * 1.01)
        return pruned, notes

    monkeypatch.setattr("fxcompress.prune.plan.cut_program", cut)
    with pytest.raises(CertificateError, match="FXC-CERT-001"):
        fxc.PruneChannels(ratio=0.5)(program("cnn"))
    assert fxc.PruneChannels(ratio=0.5, certify=False)(program("cnn")).modified


def test_bad_options_come_out_as_they_are() -> None:
    for options, text in (
        ({}, "PRUNE-004"),
        ({"ratio": 2.0}, "PRUNE-005"),
        ({"ratio": 0.5, "ignore": ("x",)}, "PRUNE-008"),
    ):
        with pytest.raises(PruneError, match=text):
            fxc.PruneChannels(**options)(program("cnn"))


def test_what_stays_is_noted() -> None:
    result = fxc.PruneChannels(ratio=0.5, width=True)(program("block"))
    assert any(note.startswith("width:") for note in result.notes)
    assert any("crosses" in note for note in result.notes)


def test_before_folding_and_after() -> None:
    """Fused layers are pruned like plain ones."""
    prune = fxc.PruneChannels(ratio=0.5, scope="local")
    before = Pipeline(passes=(prune, fxc.FoldBatchNorm(), fxc.FuseActivations()))(program("cnn"), fxc.Context())
    after = Pipeline(passes=(fxc.FoldBatchNorm(), fxc.FuseActivations(), prune))(program("cnn"), fxc.Context())
    for result in (before, after):
        parameters = dict(result.program.gm.named_parameters())
        assert parameters["inner.weight"].shape == (12, 8, 3, 3) and parameters["fc2.weight"].shape == (5, 10)
        assert result.program(*images(batch=3)).shape == (3, 5)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("onnxruntime", marks=pytest.mark.onnxruntime),
        pytest.param("openvino", marks=pytest.mark.openvino),
    ],
)
def test_pruned_and_quantized_in_an_engine(target: str) -> None:
    """One line from the user's module to an engine: pruned, certified, quantized, run at another batch size."""
    data = [x for x, _ in labelled()]
    engine = fxc.compile(
        model("cnn"),
        example("cnn"),
        passes=[fxc.PruneChannels(macs=0.5), fxc.QuantizeStatic()],
        target=target,
        calibration=data,
    )
    pruned = fxc.PruneChannels(macs=0.5)(program("cnn")).program
    x = data[0][:3]
    with torch.no_grad():
        expected = pruned(x)
    got = torch.as_tensor(engine(x))
    assert got.shape == (3, 5)
    assert (got - expected).norm() < 0.15 * expected.norm(), "eight bits are no more noise than that"
    report = str(engine.report.to_dict())
    assert "PruneChannels" in report and "certificate" in report and "float64" in report


@pytest.mark.onnxruntime
def test_train_reaches_the_pass() -> None:
    passes = [fxc.PruneChannels(ratio=0.5, importance="taylor")]
    with pytest.raises(PruneError, match="train=loader"):
        fxc.compile(model("cnn"), example("cnn"), passes=passes, target="onnxruntime")
    engine = fxc.compile(model("cnn"), example("cnn"), passes=passes, target="onnxruntime", train=labelled())
    expected = passes[0](program("cnn"), fxc.Context(train=labelled())).program
    x = images(batch=3)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(engine(*x)), expected(*x), rtol=1e-4, atol=1e-5)
