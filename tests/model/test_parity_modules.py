"""Our way through each module gives what Meta's own `forward` gives, values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from medsam2.fast.attention import attend_memory
from medsam2.fast.encoder import encode_image, project_fine
from medsam2.fast.execution import SpeedSettings, set_attention_dropout
from medsam2.model.build import ModelSpec, build_sam
from medsam2.model.tracker import Tracker, encode_memory, predict_masks

OBJECTS = 3
PARTS = ("image_encoder", "memory_attention", "mask_decoder", "memory_encoder")
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=[("hiera_nano", 128), ("hiera_tiny", 96)], ids=["nano", "tiny"])
def sam(request: pytest.FixtureRequest) -> Any:
    """Random weights, every layer with an effect. At 96 px no window of tiny's coarse stages divides the side."""
    torch.manual_seed(0)
    name, side = request.param
    network = build_sam(ModelSpec(name, image_size=side)).train()
    set_attention_dropout(network, 0.0)
    for key, parameter in network.named_parameters():
        if "gamma" in key:
            torch.nn.init.constant_(parameter, 0.5)
        elif parameter.ndim == 1 or "pos_embed" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.fixture(params=["kept", "checkpointed"])
def speed(request: pytest.FixtureRequest) -> Iterator[SpeedSettings]:
    yield SpeedSettings(checkpoint=PARTS if request.param == "checkpointed" else ())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_same(module: Any, ours: list[Tensor], theirs: list[Tensor], inputs: list[Tensor]) -> None:
    """The same values, and the same gradients of all inputs and parameters."""
    gradients = []
    for outputs in (ours, theirs):
        weighted = torch.stack(
            [(x * torch.linspace(-1, 1, x.numel()).reshape(x.shape).sin()).sum() for x in outputs]
        ).sum()
        sources = [*inputs, *module.parameters()]
        gradients.append(torch.autograd.grad(weighted, sources, allow_unused=True, retain_graph=True))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    largest = max(float(g.abs().max()) for g in gradients[1] if g is not None)
    assert largest > 0
    for mine, other in zip(*gradients, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert (mine - other).norm() <= 1e-3 * other.norm() + 1e-6 * largest * other.numel() ** 0.5


def test_the_image_encoder(sam: Any, speed: SpeedSettings) -> None:
    frames = drawn(2, 3, sam.image_size, sam.image_size)
    finer = (sam.sam_mask_decoder.conv_s0, sam.sam_mask_decoder.conv_s1)
    stages, coarse, position = encode_image(sam.image_encoder, frames, speed)
    ours = [*project_fine(sam.image_encoder, stages, finer), coarse]
    theirs = sam.image_encoder(frames)
    levels = theirs["backbone_fpn"]
    both = torch.nn.ModuleList([sam.image_encoder, *finer])
    assert_same(both, ours, [finer[0](levels[0]), finer[1](levels[1]), levels[2]], [frames])
    assert torch.equal(position, theirs["vision_pos_enc"][-1][:1])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pointers", [0, 8])
def test_the_memory_attention(sam: Any, speed: SpeedSettings, shared: bool, pointers: int) -> None:
    side, width = sam.image_size // 16, sam.mem_dim
    frames = drawn(2, sam.hidden_dim, side, side)
    owner = torch.tensor([1, 0, 1])
    embed = frames[owner]
    position = drawn(1, sam.hidden_dim, side, side, seed=1).detach()
    length = 3 * side * side + pointers
    memory, place = drawn(OBJECTS, length, width, seed=2), drawn(1, length, width, seed=3)
    inputs = (frames, owner) if shared else (embed, None)
    ours = attend_memory(sam.memory_attention, *inputs, position, memory, memory + place, pointers, speed)
    theirs = sam.memory_attention(
        curr=[embed.flatten(2).permute(2, 0, 1)],
        curr_pos=[position.flatten(2).permute(2, 0, 1).expand(-1, OBJECTS, -1)],
        memory=memory.transpose(0, 1),
        memory_pos=place.transpose(0, 1).expand(-1, OBJECTS, -1),
        num_obj_ptr_tokens=pointers,
    )
    theirs = theirs.permute(1, 2, 0).reshape(ours.shape)
    assert_same(sam.memory_attention, [ours], [theirs], [frames, memory, place])


@pytest.mark.parametrize("points", [1, 4])
def test_the_mask_decoder(sam: Any, speed: SpeedSettings, points: int) -> None:
    """All four masks and the choice among them, against `SAM2Base._forward_sam_heads`."""
    side, width = sam.image_size // 16, sam.hidden_dim
    embed = drawn(OBJECTS, width, side, side)
    high_res = (drawn(OBJECTS, width // 8, 4 * side, 4 * side, seed=1), drawn(OBJECTS, width // 4, 2 * side, 2 * side))
    coordinates = torch.rand(OBJECTS, points, 2, generator=torch.Generator().manual_seed(2)) * sam.image_size
    labels = torch.ones(OBJECTS, points, dtype=torch.int32)
    previous = drawn(OBJECTS, 1, 4 * side, 4 * side, seed=3) if points > 1 else None
    tracker = Tracker(sam)
    tracker.speed = speed
    grid = sam.sam_prompt_encoder.get_dense_pe()
    every, ious, tokens, score = speed.run(
        "mask_decoder", predict_masks, sam, embed, (coordinates, labels), previous, *high_res
    )
    sparse, dense = sam.sam_prompt_encoder(points=(coordinates, labels), boxes=None, masks=previous)
    theirs = sam.sam_mask_decoder.predict_masks(embed, grid, sparse, dense, False, list(high_res))
    sources = [embed, *high_res, *([] if previous is None else [previous])]
    assert_same(sam.sam_mask_decoder, [every, ious, tokens, score], list(theirs), sources)

    decoded = tracker._decode(embed, high_res, _prompts(coordinates, labels), previous, multimask=points == 1)
    heads = sam._forward_sam_heads(
        embed, {"point_coords": coordinates, "point_labels": labels}, previous, list(high_res), points == 1
    )
    torch.testing.assert_close(decoded.logits, heads[3], **CLOSE)
    torch.testing.assert_close(decoded.pointer, heads[5], **CLOSE)
    torch.testing.assert_close(decoded.object_score, heads[6], **CLOSE)


def _prompts(points: Tensor, labels: Tensor) -> Any:
    from medsam2.prompts.kinds import Prompts

    return Prompts(points, labels)


def test_the_memory_encoder(sam: Any, speed: SpeedSettings) -> None:
    """From low-resolution logits, against the full-resolution masks that `SAM2Base` memorises."""
    side = sam.image_size // 16
    embed, low = drawn(OBJECTS, sam.hidden_dim, side, side), drawn(OBJECTS, 1, 4 * side, 4 * side, seed=1)
    ours = speed.run("memory_encoder", encode_memory, sam, embed, low, False)
    full = torch.nn.functional.interpolate(low, (sam.image_size,) * 2, mode="bilinear", align_corners=False)
    present = torch.full((OBJECTS, 1), 10.0)
    features = [embed.flatten(2).permute(2, 0, 1)]
    theirs, _ = sam._encode_new_memory(features, [(side, side)], full, present, False)
    assert_same(sam.memory_encoder, [ours], [theirs], [embed, low])
