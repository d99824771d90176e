"""Products by oneDNN give what PyTorch's own give, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medsam2.fast import execution as speed_module
from medsam2.fast.execution import OneDnnLinear, SpeedSettings, apply_speed, use_onednn
from medsam2.model.build import ModelSpec, build_sam
from medsam2.model.tracker import Tracker


def layers(bias: bool) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    usual = nn.Linear(256, 300, bias=bias)
    fast = copy.deepcopy(usual)
    use_onednn(fast)
    assert isinstance(fast, OneDnnLinear) and fast.weight.data_ptr() != usual.weight.data_ptr()
    return usual, fast


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_a_linear_layer(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    linear_onednn = speed_module.linear_onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(1)
        return linear_onednn(x, weight, bias)

    monkeypatch.setattr(speed_module, "linear_onednn", counted)
    x = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(1))
    results = []
    for layer in layers(bias):
        source = x.clone().requires_grad_()
        output = layer(source)
        results.append((output, *torch.autograd.grad(output.sin().sum(), [source, *layer.parameters()])))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2, "once forward, once for the gradient of the input; small ones are left alone"


def test_what_comes_out_may_be_written_to_in_place() -> None:
    """The package's attention rotates projected queries in place."""
    gradients = []
    for layer in layers(True):
        output = layer(torch.ones(1, 100, 256)).view(1, 100, 10, 30).transpose(1, 2)
        output[:, :, :50] = output[:, :, :50] * 2
        output.sin().sum().backward()
        assert layer.weight.grad is not None
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["small", "half", "autocast"])
def test_the_rest_is_left_to_pytorch(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "linear_onednn", None)
    usual, fast = layers(True)
    x = torch.randn(1 if way == "small" else 200, 256)
    if way == "half":
        usual, fast, x = usual.bfloat16(), fast.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        assert torch.equal(fast(x), usual(x))


def linear_types(module: nn.Module) -> set[type]:
    return {type(layer) for layer in module.modules() if isinstance(layer, nn.Linear)}


def test_a_trackers_network_has_them_on_a_cpu_and_the_switch_takes_them_away() -> None:
    sam = build_sam(ModelSpec("hiera_nano", image_size=64))
    before = list(sam.state_dict())
    tracker = Tracker(sam)
    assert linear_types(sam) == linear_types(copy.deepcopy(sam)) == {OneDnnLinear}
    apply_speed(tracker, SpeedSettings(onednn=False))
    assert linear_types(sam) == {nn.Linear}
    apply_speed(tracker, SpeedSettings())
    assert linear_types(sam.bfloat16()) == {OneDnnLinear} and list(sam.state_dict()) == before


def test_a_network_on_another_device_keeps_plain_layers() -> None:
    """Whether it is built there or moved there; tensors of a GPU that is not there are fake, those of meta empty."""
    with torch.device("meta"):
        built = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    use_onednn(built)
    assert linear_types(built) == {nn.Linear}
    tracker = Tracker(build_sam(ModelSpec("hiera_nano", image_size=64)))
    assert linear_types(tracker.to("meta")) == {nn.Linear}
    apply_speed(tracker, SpeedSettings())
    assert linear_types(tracker) == {nn.Linear}
    with FakeTensorMode():
        layer = nn.Linear(256, 300, device="cuda")
        use_onednn(layer)
        assert type(layer) is nn.Linear
