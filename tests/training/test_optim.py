"""Parameter groups: rates by module, depth and adapter, decay of matrices alone, a cosine to the final rate."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsam2.adaptation.freeze import AdaptationSettings, apply_adaptation
from medsam2.adaptation.lora import PeftSettings, adapter_names
from medsam2.config import validate
from medsam2.errors import UserError
from medsam2.model.build import ModelSpec, build_sam
from medsam2.training.optim import (
    HEADINGS,
    OptimSettings,
    parameter_groups,
    rate_at,
    training_table,
)


@pytest.fixture(scope="module")
def sam() -> torch.nn.Module:
    return build_sam(ModelSpec("hiera_nano", "2.1", 128))


CONFIGS = {"ia3": {"_target_": "peft.IA3Config", "feedforward_modules": []}, "loha": {"_target_": "peft.LoHaConfig"}}


def with_adapter(method: str = "dora", train: tuple[str, ...] = ("mask_decoder",)) -> torch.nn.Module:
    network = build_sam(ModelSpec("hiera_nano", "2.1", 128))
    peft = PeftSettings(config=CONFIGS[method]) if method in CONFIGS else PeftSettings(method=method)
    apply_adaptation(network, AdaptationSettings(train=train, peft=peft))
    return network


def group_of(sam: torch.nn.Module, settings: OptimSettings, name: str) -> dict:  # type: ignore[type-arg]
    wanted = dict(sam.named_parameters())[name]
    return next(g for g in parameter_groups(sam, settings) if any(p is wanted for p in g["params"]))


def test_every_trained_parameter_is_in_exactly_one_group(sam: torch.nn.Module) -> None:
    grouped = [id(p) for g in parameter_groups(sam, OptimSettings(layer_decay=0.9)) for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in sam.parameters() if p.requires_grad)


def test_norms_biases_and_embeddings_have_no_decay(sam: torch.nn.Module) -> None:
    settings = OptimSettings(weight_decay=0.1)
    for name in ("image_encoder.trunk.blocks.0.norm1.weight", "memory_attention.norm.bias", "no_mem_embed",
                 "maskmem_tpos_enc", "no_obj_ptr", "no_obj_embed_spatial", "image_encoder.trunk.pos_embed",
                 "image_encoder.trunk.pos_embed_window", "memory_encoder.fuser.layers.0.gamma"):  # fmt: skip
        assert group_of(sam, settings, name)["weight_decay"] == 0, name
    assert group_of(sam, settings, "image_encoder.trunk.blocks.0.attn.qkv.weight")["weight_decay"] == 0.1
    norms = {id(p) for m in sam.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    for group in parameter_groups(sam, settings):
        if group["weight_decay"]:
            assert not norms & {id(p) for p in group["params"]}


def test_layers_decay_from_the_last_block_to_the_first(sam: torch.nn.Module) -> None:
    settings = OptimSettings(lr=1.0, layer_decay=0.5, module_lr={"image_encoder": 0.1})
    rates = [group_of(sam, settings, f"image_encoder.trunk.blocks.{i}.mlp.layers.0.weight")["lr"] for i in range(7)]
    assert rates == pytest.approx([0.1 * 0.5 ** (7 - i) for i in range(7)])
    assert group_of(sam, settings, "image_encoder.trunk.patch_embed.proj.weight")["lr"] == pytest.approx(0.1 * 0.5**8)
    for whole in ("neck.convs.0.conv.weight", "trunk.pos_embed", "trunk.pos_embed_window"):
        assert group_of(sam, settings, f"image_encoder.{whole}")["lr"] == pytest.approx(0.1), whole
    assert group_of(sam, settings, "sam_mask_decoder.iou_token.weight")["lr"] == 1.0


@given(st.integers(1, 500), st.integers(0, 50), st.floats(0, 1))
def test_rate_never_exceeds_its_peak_and_ends_at_the_final_rate(steps: int, warmup: int, final: float) -> None:
    settings = OptimSettings(warmup_steps=warmup, final_lr=final)
    rates = [rate_at(step, steps + warmup, settings) for step in range(steps + warmup + 1)]
    assert max(rates) <= 1 + 1e-9
    assert rates[-1] == pytest.approx(final)


# ------------------------------------------------------------------------------------------------ adapters


def test_adapters_have_their_own_rate_and_no_layer_decay() -> None:
    sam = with_adapter()
    name = "image_encoder.trunk.blocks.0.attn.qkv.lora_A.default.weight"
    settings = OptimSettings(lr=1e-3, adapter_lr=8, layer_decay=0.5, module_lr={"image_encoder": 0.1})
    assert group_of(sam, settings, name)["lr"] == pytest.approx(8e-3)
    assert group_of(sam, settings, "sam_mask_decoder.iou_token.weight")["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("method", "decayed"), [("lora", "lora_"), ("dora", "lora_[AB]"), ("ia3", None), ("loha", "hada")]
)
def test_matrices_of_adapters_decay_and_scales_do_not(method: str, decayed: str | None) -> None:
    sam = with_adapter(method, train=())
    groups = parameter_groups(sam, OptimSettings(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    own = adapter_names([name for name, _ in sam.named_parameters()])
    assert len(decay) == len(own)
    for name, parameter in sam.named_parameters():
        if name in own:
            expected = 0.1 if decayed and re.search(decayed, name) else 0.0
            assert decay[id(parameter)] == expected, name


def test_a_rate_for_an_unknown_module_is_refused_with_the_closest_name() -> None:
    with pytest.raises(UserError, match="module_lr.*Did you mean 'image_encoder'"):
        validate(OptimSettings, {"module_lr": {"image_encodr": 0.5}}, "optim")
    with pytest.raises(UserError, match="adaptation.freeze"):
        validate(OptimSettings, {"module_lr": {"image_encoder": 0.0}}, "optim")


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_shows_rates_and_decay_of_weights_and_adapters() -> None:
    sam = with_adapter("lora")
    settings = OptimSettings(lr=1e-4, adapter_lr=10, weight_decay=0.1)
    rows = training_table(sam, settings)
    encoder, adapter = rows[:2]
    assert encoder[0] == "image_encoder" and encoder[2:] == ("frozen", "", "")
    assert adapter[0] == "  adapter" and adapter[1] == adapter[2] and adapter[3:] == ("0.001", "0.1")
    decoder = next(row for row in rows if row[0] == "mask_decoder")
    assert decoder[1] == decoder[2] and len(decoder) == len(HEADINGS)
    counts = [int(row[1].replace(",", "")) for row in rows if row[0] != "  adapter"]
    assert sum(counts) == ModelSpec("hiera_nano").size.parameters["2.1"]


def test_the_table_shows_the_range_of_the_rates_of_a_module(sam: torch.nn.Module) -> None:
    rows = training_table(sam, OptimSettings(lr=1e-3, layer_decay=0.5))
    assert rows[0][0] == "image_encoder" and rows[0][3] == "3.91e-06 to 0.001"
