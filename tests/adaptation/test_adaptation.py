"""What is trained: parts by pattern, adapters on the layers that they should be on, and exact ways back."""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medsam2.adaptation.freeze import AdaptationSettings, apply_adaptation, module_of
from medsam2.adaptation.lora import (
    TARGETS,
    PeftSettings,
    adapter_names,
    adapter_state,
    base_state,
    has_adapter,
    inject,
    load_adapter_state,
    merge,
    official_state,
    peft_config,
    targeted_layers,
)
from medsam2.config import compose, configs_dir, option_names, validate
from medsam2.errors import UserError
from medsam2.model.build import ModelSpec, build_sam, load_model
from medsam2.model.losses import LossSettings, clip_loss
from medsam2.model.rollout import rollout
from medsam2.model.tracker import Tracker
from medsam2.prompts.settings import PromptSettings
from medsam2.prompts.simulate import PromptPlan

ALL = tuple(TARGETS)
LOHA = {"_target_": "peft.LoHaConfig", "r": 8, "alpha": 16}
OPTIONS: dict[str, dict[str, object]] = {"lora": {}, "dora": {"method": "dora"}, "loha": {"config": LOHA}}
GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "adaptation.md"
NAMES = option_names(configs_dir() / "adaptation")


def settings(targets: tuple[str, ...] = ALL, train: tuple[str, ...] = (), **peft: object) -> AdaptationSettings:
    return AdaptationSettings(train=train, peft=PeftSettings(targets=targets, **peft))


def adapted(method: str = "lora", seed: int = 0, disturb: float = 0.05, **options: object) -> torch.nn.Module:
    """The shipped nano with adapters that do something, as after some training."""
    torch.manual_seed(seed)
    sam = load_model("nano").sam
    apply_adaptation(sam, settings(ALL, **{**OPTIONS[method], **options}))
    with torch.no_grad():
        for parameter in sam.parameters():
            if parameter.requires_grad:
                parameter.add_(disturb * torch.randn_like(parameter))
    return sam


def outputs(sam: torch.nn.Module) -> list[Tensor]:
    """What every targeted part gives: encoder, memory attention and mask decoder on fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    frames = torch.randn(1, 3, 128, 128, generator=generator)
    memory = torch.randn(64, 1, 64, generator=generator)
    with torch.no_grad():
        tracker = Tracker(sam).eval()  # type: ignore[arg-type]
        features = tracker.encode(frames)
        tokens = features.embed.flatten(2).permute(2, 0, 1)
        attended = sam.memory_attention(
            curr=tokens, curr_pos=torch.zeros_like(tokens), memory=memory, memory_pos=torch.zeros_like(memory),
            num_obj_ptr_tokens=0,
        )  # fmt: skip
        points = (torch.tensor([[[40.0, 50.0]]]), torch.tensor([[1]], dtype=torch.int32))
        sparse, dense = sam.sam_prompt_encoder(points=points, boxes=None, masks=None)
        masks, ious, _, _ = sam.sam_mask_decoder(
            image_embeddings=features.embed, image_pe=sam.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=True, repeat_image=False,
            high_res_features=list(features.high_res),
        )  # fmt: skip
    return [features.embed, attended, masks, ious]


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of each output."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------ counts


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return build_sam(ModelSpec("hiera_tiny", "2.1", 512))


def trained(sam: torch.nn.Module, settings: AdaptationSettings) -> Counter[tuple[str, str]]:
    """Trained parameters of an adapted copy by module and "weights" or "adapter"."""
    sam, counts = copy.deepcopy(sam), Counter()
    apply_adaptation(sam, settings)
    in_adapter = adapter_names([name for name, _ in sam.named_parameters()])
    for name, parameter in sam.named_parameters():
        if parameter.requires_grad:
            counts[module_of(name), "adapter" if name in in_adapter else "weights"] += parameter.numel()
    return counts


@pytest.mark.parametrize(("target", "parameters"), list(zip(ALL, (612_864, 266_240, 167_936), strict=True)))
def test_lora_of_rank_8_on_tiny_has_the_known_number_of_parameters(
    tiny: torch.nn.Module, target: str, parameters: int
) -> None:
    assert trained(tiny, settings((target,))) == {(target, "adapter"): parameters}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_names_every_setting_and_trains_what_the_guide_says(name: str, tiny: torch.nn.Module) -> None:
    config = compose("train", [f"adaptation={name}", "data.shards=s", "output=o"])["adaptation"]
    settings = validate(AdaptationSettings, config, name)
    assert config.keys() == AdaptationSettings.model_fields.keys()
    assert settings.peft is None or config["peft"].keys() == PeftSettings.model_fields.keys()
    counts = [trained(sam, settings) for sam in (build_sam(ModelSpec("hiera_nano")), tiny)]
    assert (settings.peft is not None) == any(part == "adapter" for _, part in counts[0])
    sums = [count.total() for count in counts]
    row = re.search(rf"^\| `{name}` \| ([0-9,]+) \|[^|]*\| ([0-9,]+) \|", GUIDE.read_text(), re.MULTILINE)
    assert row and [int(count.replace(",", "")) for count in row.groups()] == sums, f"{GUIDE}: {sums}"


def test_a_full_decoder_and_adapters_on_the_encoder_go_together() -> None:
    sam = build_sam(ModelSpec("hiera_nano"))
    decoder = sum(p.numel() for name, p in sam.named_parameters() if module_of(name) == "mask_decoder")
    counts = trained(sam, settings(("image_encoder",), ("mask_decoder",)))
    assert counts.keys() == {("image_encoder", "adapter"), ("mask_decoder", "weights")}
    assert counts["mask_decoder", "weights"] == decoder


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("method", list(OPTIONS))
def test_a_training_step_reaches_every_adapter_weight_and_no_frozen_one(method: str) -> None:
    sam = adapted(method)
    frozen = {name: value.clone() for name, value in sam.named_parameters() if not value.requires_grad}
    clip_step(Tracker(sam).train())  # type: ignore[arg-type]
    in_adapter = adapter_names([name for name, _ in sam.named_parameters()])
    for name, parameter in sam.named_parameters():
        if name in in_adapter:
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), f"no gradient in {name}"
        else:
            assert parameter.grad is None, name
    assert all(torch.equal(dict(sam.named_parameters())[name], value) for name, value in frozen.items())


def clip_step(tracker: Tracker) -> Tensor:
    """Loss of a clip of three frames with a corrected click on the first, and its gradients."""
    frames = torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 3, 128, 128, dtype=torch.bool)
    masks[:, :, 30:80, 20:70] = True
    frames = frames + 2.0 * masks[0][:, None]
    plan = PromptPlan(kind="click", conditioning=(0,), corrected=(0,), corrections=1)
    tracked = rollout(
        tracker,
        tracker.encode(frames),
        masks,
        torch.tensor([0]),
        torch.tensor([1]),
        plan,
        PromptSettings(corrections=1),
    )
    loss = clip_loss(tracked, masks, LossSettings(), torch.tensor(1.0)).total
    loss.backward()
    return loss.detach()


def test_steps_with_lora_alone_lower_the_loss_and_leave_the_base_untouched() -> None:
    sam = adapted("lora", disturb=0.0)
    before = {key: value.clone() for key, value in base_state(sam).items()}
    tracker = Tracker(sam).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in sam.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(float(clip_step(tracker)))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(torch.equal(value, before[key]) for key, value in base_state(sam).items())


# ------------------------------------------------------------------------------------------------ ways back


@pytest.mark.parametrize("method", list(OPTIONS))
def test_merged_weights_are_official_and_give_the_outputs_of_the_adapted_model(method: str) -> None:
    sam = adapted(method)
    plain = load_model("nano").sam
    before = outputs(sam)
    assert difference(before, outputs(plain)) > 1e-3, "the adapters do nothing, so equal outputs prove nothing"
    state = official_state(sam)
    assert list(state) == sorted(state, key=list(plain.state_dict()).index)
    plain.load_state_dict(state, strict=True)
    assert difference(outputs(plain), before) <= 2e-6
    assert difference(outputs(sam), before) == 0.0, "taking the weights out changed the model"


def test_merging_in_double_precision_is_exact() -> None:
    layer = "image_encoder.trunk.blocks.2.attn.qkv"
    sam = adapted("lora").double()
    part = sam.get_submodule(layer)
    x = torch.randn(7, part.in_features, dtype=torch.float64)
    state = official_state(sam)
    merged = torch.nn.functional.linear(x, state[f"{layer}.weight"], state[f"{layer}.bias"])
    a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
    by_hand = part.base_layer(x) + x @ a.T @ b.T * 16 / 8
    assert torch.allclose(merged, part(x), atol=1e-13) and torch.allclose(merged, by_hand, atol=1e-13)


def test_taking_weights_out_in_mid_training_does_not_disturb_it() -> None:
    losses = []
    for disturbed in (False, True):
        sam = adapted("dora", disturb=0.0)
        tracker = Tracker(sam).train()  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW([p for p in sam.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            loss = clip_step(tracker)
            if disturbed:
                official_state(sam)
                adapter_state(sam)
            optimizer.step()
        losses.append(float(loss))
    assert losses[0] == losses[1]


def test_merge_in_place_leaves_a_plain_model_that_can_be_adapted_again() -> None:
    sam = adapted("lora")
    before, state = outputs(sam), official_state(sam)
    merge(sam)
    assert not has_adapter(sam) and all(torch.equal(value, state[key]) for key, value in sam.state_dict().items())
    assert difference(outputs(sam), before) <= 2e-6
    inject(sam, PeftSettings())
    assert has_adapter(sam)


@pytest.mark.parametrize("method", list(OPTIONS))
def test_an_adapter_moves_to_another_copy_of_its_base(method: str) -> None:
    sam = adapted(method)
    state = adapter_state(sam)
    assert len(state) == sum(1 for p in sam.parameters() if p.requires_grad)
    other = load_model("nano").sam
    inject(other, PeftSettings(targets=ALL, **OPTIONS[method]))
    load_adapter_state(other, state, "adapter")
    assert difference(outputs(other), outputs(sam)) == 0.0


def test_parts_trained_in_full_are_part_of_what_an_adapter_brings() -> None:
    torch.manual_seed(0)
    sam = load_model("nano").sam
    apply_adaptation(sam, settings(("image_encoder",), ("mask_decoder", r"image_encoder\..*norm1", "maskmem_tpos_enc")))
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter) * parameter.requires_grad)
    other = load_model("nano").sam
    inject(other, PeftSettings())
    load_adapter_state(other, adapter_state(sam), "adapter")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in sam.state_dict().items())


def test_without_an_adapter_the_official_state_is_the_state() -> None:
    sam = build_sam(ModelSpec("hiera_nano"))
    state = official_state(sam)
    assert all(torch.equal(value, state[key]) for key, value in sam.state_dict().items())
    assert not has_adapter(sam)
    with pytest.raises(UserError, match="no adapter"):
        adapter_state(sam)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    return build_sam(ModelSpec("hiera_nano"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (settings(("image_encodr",)), "image_encodr.*matches no layer.*Did you mean 'image_encoder'"),
        (settings(("memory_attention", r"sam_mask_decoder\.nothing")), r"sam_mask_decoder\\\\.nothing.*no layer"),
        (settings((r"memory_encoder\.pix_feat_proj",)), "pix_feat_proj, a Conv2d.*linear"),
        (settings(("(",)), "not a regular expression"),
        (settings(("image_encoder",), ("image_encoder",)), "blocks.0.attn.qkv has an adapter and is trained in full"),
        (settings(config={"_target_": "peft.NoSuchConfig"}), "NoSuchConfig"),
        (settings(config={"_target_": "peft.LoHaConfig", "rank": 8}), "LoHaConfig.*rank"),
        (AdaptationSettings(train=("no_such",)), "no_such.*matches no parameter"),
        (AdaptationSettings(train=()), "nothing to train"),
    ],
)
def test_a_wrong_adaptation_is_refused_by_name(
    plain: torch.nn.Module, settings: AdaptationSettings, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        apply_adaptation(copy.deepcopy(plain), settings)


@pytest.mark.parametrize("option", [{"r": 0}, {"method": "loha"}, {"config": {"_target_": "os.system"}}])
def test_settings_that_cannot_be_an_adapter_are_refused(option: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"peft.*({next(iter(option))})"):
        validate(AdaptationSettings, {"peft": option}, "the configuration")


@pytest.mark.parametrize(("method", "kind"), [("lora", "LoraConfig"), ("lokr", "LoKrConfig"), ("oft", "OFTConfig")])
def test_settings_in_checkpoints_of_version_0_1_are_read(method: str, kind: str) -> None:
    saved = {"targets": ["mask_decoder"], "r": 4, "alpha": 8, "dropout": 0.0, "rslora": False, "block_size": 32}
    read = PeftSettings.model_validate({**saved, "method": method})
    assert type(peft_config(read)).__name__ == kind and read.targets == ("mask_decoder",)


def test_a_second_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="has an adapter already"):
        inject(adapted("lora"), PeftSettings())


def test_an_adapter_of_another_rank_or_with_a_missing_weight_is_refused() -> None:
    state = adapter_state(adapted("lora"))
    other = adapted("lora", r=4)
    with pytest.raises(UserError, match="size mismatch|shape"):
        load_adapter_state(other, state, "adapter")
    name = next(iter(state))
    state.pop(name)
    with pytest.raises(UserError, match="lacks image_encoder.trunk.blocks.0.attn.qkv.lora_A"):
        load_adapter_state(adapted("lora"), state, "adapter")


def test_a_diverged_adapter_is_not_merged() -> None:
    sam = adapted("lora")
    name = targeted_layers(load_model("nano").sam, PeftSettings())[0]
    with torch.no_grad():
        sam.get_submodule(name).lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=f"{name} cannot be merged"):
        official_state(sam)
