"""Weights between two checkpoints: exact at both ends, refused where the two do not belong together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medsam2.adaptation.anchors import Anchors
from medsam2.adaptation.freeze import AdaptationSettings, apply_adaptation
from medsam2.adaptation.interpolate import check_shares, interpolate, interpolated_provenance
from medsam2.adaptation.lora import PeftSettings, official_state
from medsam2.errors import UserError
from medsam2.model.build import LoadedModel, ModelSpec, load_model
from medsam2.model.provenance import Provenance

NANO = ModelSpec("hiera_nano", "2.1", 128)


def states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    start = {"a": torch.randn(3, 4), "b": torch.randn(5).half(), "steps": torch.tensor(3)}
    return start, {"a": torch.randn(3, 4), "b": torch.randn(5).half(), "steps": torch.tensor(7)}


def test_both_ends_are_exact_and_the_middle_is_the_mean() -> None:
    start, end = states()
    for share, expected in ((0, start), (1, end)):
        result = interpolate(start, end, share)
        assert all(torch.equal(result[name], expected[name].float()) for name in ("a", "b"))
        assert result["steps"] == 7, "what is not floating point is the end's"
    middle = interpolate(start, end, 0.5)
    torch.testing.assert_close(middle["a"], (start["a"] + end["a"]) / 2)
    assert middle["b"].dtype == torch.float32


@pytest.mark.parametrize("change", ["name", "shape"])
def test_states_of_two_networks_are_refused_with_what_differs(change: str) -> None:
    start, end = states()
    end["a" if change == "shape" else "c"] = torch.zeros(2)
    with pytest.raises(UserError, match=r"differ in (a|c) \(1 in all\)"):
        interpolate(start, end, 0.5)


def test_shares_are_sorted_and_must_lie_between_start_and_end() -> None:
    assert check_shares([0.7, 0.3, 0.7]) == (0.3, 0.7)
    with pytest.raises(UserError, match=r"1\.5 is not between"):
        check_shares([0.5, 1.5])
    with pytest.raises(UserError, match="no share"):
        check_shares([])


def test_an_interpolated_checkpoint_knows_the_training_cases_of_both_ends() -> None:
    start = LoadedModel(nn.Module(), NANO, Provenance(content_hashes=("1",), datasets={"a": {"licence": "CC0"}}), "s")
    end = LoadedModel(nn.Module(), NANO, Provenance(content_hashes=("2",), datasets={"b": {}}, step=9), "e")
    between = interpolated_provenance(start, end, 0.3)
    assert between.content_hashes == ("1", "2") and set(between.datasets) == {"a", "b"}
    assert between.step == 9 and between.interpolated == 0.3 and between.spec == NANO
    other = LoadedModel(nn.Module(), ModelSpec("hiera_tiny", "2.1", 512), source="big.pt")
    with pytest.raises(UserError, match=r"big\.pt is hiera_tiny"):
        interpolated_provenance(other, end, 0.3)


# ---------------------------------------------------------------------------------------------------- anchors

ADAPTATIONS = {
    "full": AdaptationSettings(),
    "decoder": AdaptationSettings(train=("mask_decoder",)),
    "lora": AdaptationSettings(train=(), peft=PeftSettings(targets=("image_encoder", "mask_decoder"))),
    "dora_and_memory": AdaptationSettings(train=("memory_attention",), peft=PeftSettings(method="dora")),
}


@pytest.fixture(params=ADAPTATIONS)
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, Anchors, dict[str, torch.Tensor]]:
    """An adapted nano whose trained weights have moved, its anchors, and the weights that it started from."""
    torch.manual_seed(1)
    sam = load_model("nano").sam
    start = {name: value.clone() for name, value in sam.state_dict().items()}
    apply_adaptation(sam, ADAPTATIONS[request.param])
    anchors = Anchors(sam)
    with torch.no_grad():
        for parameter in sam.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return sam, anchors, start


Trained = tuple[nn.Module, Anchors, dict[str, torch.Tensor]]


def test_anchors_hold_no_more_than_what_is_trained(trained: Trained) -> None:
    sam, anchors, _ = trained
    held = sum(value.numel() for value in anchors.values.values())
    assert held == sum(p.numel() for p in sam.parameters() if p.requires_grad)


def test_at_the_start_the_network_is_that_of_the_start_and_afterwards_its_own_again(trained: Trained) -> None:
    sam, anchors, start = trained
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    with anchors.at_start(sam):
        result = official_state(sam)
    torch.testing.assert_close(result, start, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in sam.state_dict().items())
    assert all(torch.equal(value, start[name]) for name, value in anchors.start_state(sam).items())
    with pytest.raises(RuntimeError), anchors.at_start(sam):
        raise RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in sam.state_dict().items())


def test_mixed_precision_does_not_take_the_weights_of_the_start_for_those_of_now() -> None:
    """Autocast keeps its casts of weights, and those made without gradient would be used in the training step."""
    net, inputs = nn.Linear(4, 3), torch.randn(2, 4)
    anchors = Anchors(net)
    with torch.no_grad():
        net.weight.add_(1.0)
        with torch.autocast("cpu", torch.bfloat16):
            expected = net(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), anchors.at_start(net):
            assert not torch.allclose(net(inputs), expected)
        result = net(inputs)
    torch.testing.assert_close(result.detach(), expected)
    result.float().sum().backward()
    assert net.weight.grad is not None


def test_a_pull_by_one_is_all_the_way_back_and_frozen_weights_stay(trained: Trained) -> None:
    sam, anchors, _ = trained
    frozen = {name: p.clone() for name, p in sam.named_parameters() if not p.requires_grad}
    trained_parameters = {name: p for name, p in sam.named_parameters() if name in anchors.values}

    def distance() -> float:
        return (
            float(sum((p.detach() - anchors.values[name]).square().sum() for name, p in trained_parameters.items()))
            ** 0.5
        )

    before = distance()
    anchors.pull(sam, dict.fromkeys(anchors.values, 0.25))
    assert distance() == pytest.approx(0.75 * before, rel=1e-4) and before > 0
    anchors.pull(sam, dict.fromkeys(anchors.values, 1.0))
    assert distance() == 0
    assert all(torch.equal(p, frozen[name]) for name, p in sam.named_parameters() if name in frozen)
