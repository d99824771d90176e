"""Parameter groups: rates by module and depth, no decay on norms and biases, a cosine to the final rate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsam2.model.build import ModelSpec, build_sam
from medsam2.training.optim import OptimSettings, parameter_groups, rate_at


@pytest.fixture(scope="module")
def sam() -> torch.nn.Module:
    return build_sam(ModelSpec("hiera_nano", "2.1", 128))


def group_of(sam: torch.nn.Module, settings: OptimSettings, name: str) -> dict:  # type: ignore[type-arg]
    wanted = dict(sam.named_parameters())[name]
    return next(g for g in parameter_groups(sam, settings) if any(p is wanted for p in g["params"]))


def test_every_trained_parameter_is_in_exactly_one_group(sam: torch.nn.Module) -> None:
    grouped = [id(p) for g in parameter_groups(sam, OptimSettings(layer_decay=0.9)) for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in sam.parameters() if p.requires_grad)


def test_norms_biases_and_embeddings_have_no_decay(sam: torch.nn.Module) -> None:
    settings = OptimSettings(weight_decay=0.1)
    for name in ("image_encoder.trunk.blocks.0.norm1.weight", "memory_attention.norm.bias", "no_mem_embed",
                 "maskmem_tpos_enc", "image_encoder.trunk.pos_embed"):  # fmt: skip
        assert group_of(sam, settings, name)["weight_decay"] == 0, name
    assert group_of(sam, settings, "image_encoder.trunk.blocks.0.attn.qkv.weight")["weight_decay"] == 0.1


def test_layers_decay_from_the_last_block_to_the_first(sam: torch.nn.Module) -> None:
    settings = OptimSettings(lr=1.0, layer_decay=0.5, module_lr={"image_encoder": 0.1})
    rates = [group_of(sam, settings, f"image_encoder.trunk.blocks.{i}.mlp.layers.0.weight")["lr"] for i in range(7)]
    assert rates == pytest.approx([0.1 * 0.5 ** (7 - i) for i in range(7)])
    assert group_of(sam, settings, "image_encoder.neck.convs.0.conv.weight")["lr"] == pytest.approx(0.1)
    assert group_of(sam, settings, "sam_mask_decoder.iou_token.weight")["lr"] == 1.0


@given(st.integers(1, 500), st.integers(0, 50), st.floats(0, 1))
def test_rate_never_exceeds_its_peak_and_ends_at_the_final_rate(steps: int, warmup: int, final: float) -> None:
    settings = OptimSettings(warmup_steps=warmup, final_lr=final)
    rates = [rate_at(step, steps + warmup, settings) for step in range(steps + warmup + 1)]
    assert max(rates) <= 1 + 1e-9
    assert rates[-1] == pytest.approx(final)
