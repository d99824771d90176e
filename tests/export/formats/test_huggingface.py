"""The Hugging Face export: transformers alone loads the folder and gives our masks, or nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medsam2.adaptation.adapter import adapter_provenance
from medsam2.adaptation.freeze import AdaptationSettings, apply_adaptation
from medsam2.adaptation.lora import PeftSettings
from medsam2.errors import UserError
from medsam2.export.formats import huggingface
from medsam2.export.formats.huggingface import HuggingFaceExporter, video_config
from medsam2.export.formats.huggingface_keys import from_huggingface, to_huggingface
from medsam2.export.run import ExportResult, export_model
from medsam2.export.verify.clip import at_model_side, generated_clip
from medsam2.export.verify.consumers.huggingface_consumer import Consumer
from medsam2.export.verify.questions import reference_questions
from medsam2.export.verify.run import MIN_IOU, compare
from medsam2.model.build import LoadedModel, ModelSpec, build_sam, load_model
from medsam2.model.provenance import Provenance

SIZES = [("hiera_nano", "2.1"), ("hiera_tiny", "2.1"), ("hiera_tiny", "2.0")]
SHORT = generated_clip(length=3, side=64)
LARGE = [("hiera_small", "2.1"), ("hiera_base_plus", "2.1"), ("hiera_base_plus", "2.0"), ("hiera_large", "2.1")]


def seeing(spec: ModelSpec) -> LoadedModel:
    """Random weights whose masks are neither empty nor full."""
    torch.manual_seed(0)
    sam = build_sam(spec)
    with torch.no_grad():
        sam.sam_mask_decoder.pred_obj_score_head.layers[2].bias += 2
        for head in sam.sam_mask_decoder.output_hypernetworks_mlps:
            head.layers[2].weight *= 30
    return LoadedModel(sam.eval(), spec, source="random")


@pytest.fixture(scope="module")
def nano() -> LoadedModel:
    """At 256 px: not the side of the size, nor transformers' default."""
    return seeing(ModelSpec("hiera_nano", image_size=256))


@pytest.fixture(scope="module")
def exported(nano: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "hub"
    export(nano, out)
    return out


def export(checkpoint: Any, out: Path, **options: Any) -> ExportResult:
    return export_model(checkpoint, "huggingface", out, **options)[0]


def in_this_process(folder: Path, ours: LoadedModel) -> float:
    """Overlap of transformers' masks with ours in the shortest check: a click, carried on over some frames."""
    clip = at_model_side(generated_clip(), ours.spec.image_size)
    question = reference_questions(ours, clip, torch.bfloat16)[1]
    frames = clip.frames[slice(*question.request["frames"])].numpy()
    return compare(question.expected, Consumer(str(folder)).follow(frames, question.request["prompts"]))["iou"]


# ---------------------------------------------------------------------------------------------------- what is written


def test_transformers_gives_our_masks_from_every_kind_of_prompt(exported: Path) -> None:
    report = json.loads((exported / "verify.json").read_text())
    assert report["verified"] and report["objects"] == 2 and report["frames"] == 10
    assert 0.02 < report["foreground"] < 0.98 and report["compared"] > 0.5, "the comparison proves nothing"
    assert report["max_logit_difference"] < 1e-3 and report["max_score_difference"] < 1e-4
    kinds = " ".join(report["items"])
    assert all(word in kinds for word in ("image", "boxes", "click", "mask", "propagation", "both ways"))
    for name, item in report["items"].items():
        # the logits are held above; of small masks, one pixel whose logit is 1e-5 from 0 costs 2e-4 on some processors
        assert item["iou"] > (0.95 if name == "propagation from a mask" else 0.999), name


def test_the_folder_is_what_transformers_names_it(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json",
        "verify.json", "video_preprocessor_config.json",
    ]  # fmt: skip


def test_auto_classes_of_transformers_find_model_and_processor(exported: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(exported), AutoProcessor.from_pretrained(exported)
    assert type(model).__name__ == "Sam2VideoModel" and type(processor).__name__ == "Sam2VideoProcessor"
    assert processor.target_size == 256 and model.config.image_size == 256


def test_every_entry_that_the_side_enters_is_set(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    processor = json.loads((exported / "processor_config.json").read_text())
    assert config["image_size"] == config["prompt_encoder_config"]["image_size"] == 256
    assert config["vision_config"]["backbone_config"]["image_size"] == [256, 256]
    assert config["vision_config"]["backbone_feature_sizes"] == [[64, 64], [32, 32], [16, 16]]
    assert config["memory_attention_rope_feat_sizes"] == [16, 16]
    for part in ("image_processor", "video_processor"):
        assert processor[part]["size"] == {"height": 256, "width": 256}
    assert processor["image_processor"]["mask_size"] == {"height": 64, "width": 64}
    alone = json.loads((exported / "preprocessor_config.json").read_text())
    assert alone["size"] == processor["image_processor"]["size"]


@pytest.mark.slow
def test_lines_of_the_card_run_in_a_fresh_process(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    code = "\n".join(part.split("```")[0] for part in card.split("```python\n")[1:])
    code += """
assert sorted(masks) == [0, 1, 2, 3, 4] and masks[4].shape == (2, 1, 200, 240) and masks[4].dtype == torch.bool
assert candidates.shape == (1, 3, 200, 240) and outputs.iou_scores.shape == (1, 1, 3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_header_keeps_what_the_checkpoint_knows(exported: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(exported / "model.safetensors"), framework="pt") as file:
        said = json.loads(file.metadata()["medsam2"])
    assert said["spec"] == {"name": "hiera_nano", "version": "2.1", "image_size": 256}


# ---------------------------------------------------------------------------------------------------- names of weights


@pytest.mark.parametrize(("name", "version"), [*SIZES, *(pytest.param(*one, marks=pytest.mark.slow) for one in LARGE)])
def test_weights_of_every_size_go_there_and_back(name: str, version: str) -> None:
    from transformers import Sam2VideoModel

    spec = ModelSpec(name, version)
    state = build_sam(spec).state_dict()
    theirs = to_huggingface(state)
    with torch.device("meta"):
        wanted = Sam2VideoModel(video_config(spec)).state_dict()
    assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in wanted.items()}
    back = from_huggingface(theirs, state, "there")
    assert list(back) == list(state) and all(torch.equal(back[key], state[key]) for key in state)


def test_names_of_tiny_are_471_and_469() -> None:
    state = build_sam(ModelSpec("hiera_tiny")).state_dict()
    assert (len(state), len(to_huggingface(state))) == (471, 469)


@pytest.mark.parametrize("change", ["lacks", "has"])
def test_a_missing_or_extra_name_is_counted_and_named(nano: LoadedModel, change: str) -> None:
    theirs = to_huggingface(nano.sam.state_dict())
    if change == "lacks":
        del theirs["no_object_pointer"]
    else:
        theirs["head.bias"] = torch.zeros(1)
    with pytest.raises(UserError, match=f"x.safetensors {change} 1 .*(no_object_pointer|head.bias)"):
        from_huggingface(theirs, nano.sam.state_dict(), "x.safetensors")


# ---------------------------------------------------------------------------------------------------- other networks


def test_adapters_are_merged(tmp_path: Path) -> None:
    loaded = load_model("nano")
    recipe = AdaptationSettings(train=(), peft=PeftSettings(targets=("image_encoder",)))
    apply_adaptation(loaded.sam, recipe)
    provenance = Provenance(spec=loaded.spec, adapter=adapter_provenance(loaded.sam, recipe, loaded.source))
    with torch.no_grad():
        for parameter in loaded.sam.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    path = tmp_path / "last.ckpt"
    state = {f"tracker.sam.{key}": value for key, value in loaded.sam.state_dict().items()}
    torch.save({"state_dict": state, "medsam2": provenance.to_dict()}, path)
    export(path, tmp_path / "out", verify=False)
    written = load_file(tmp_path / "out" / "model.safetensors")
    merged = to_huggingface(load_model(path).sam.state_dict())
    plain = to_huggingface(load_model("nano").sam.state_dict())
    assert {*written} == {*merged} and all(torch.equal(written[key], merged[key]) for key in written)
    assert not torch.equal(
        written["vision_encoder.backbone.blocks.0.attn.qkv.weight"],
        plain["vision_encoder.backbone.blocks.0.attn.qkv.weight"],
    )


def test_bfloat16_is_half_the_size_and_computed_in_float32(nano: LoadedModel, tmp_path: Path) -> None:
    sam = build_sam(nano.spec)
    sam.load_state_dict({key: value.bfloat16().float() for key, value in nano.sam.state_dict().items()})
    rounded = LoadedModel(sam.eval(), nano.spec, Provenance(dtype="bf16"), "random")
    export(rounded, tmp_path / "out", verify=False)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == pytest.approx(2 * sum(value.numel() for value in sam.state_dict().values()), rel=0.02)
    consumer = Consumer(str(tmp_path / "out"))
    assert consumer.load("Sam2Video")[0].dtype == torch.float32
    assert in_this_process(tmp_path / "out", rounded) > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("spec", [ModelSpec("hiera_tiny", image_size=512), ModelSpec("hiera_tiny", "2.0", 256)])
def test_larger_networks_give_our_masks(spec: ModelSpec, tmp_path: Path) -> None:
    report = export(seeing(spec), tmp_path / "out").report
    assert report["max_logit_difference"] < 1e-3 and report["iou"] > 0.9999


# ---------------------------------------------------------------------------------------------------- what must fail


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("config.json", ("prompt_encoder_config", "image_size"), 512),
        ("config.json", ("memory_attention_rope_feat_sizes",), [32, 32]),
        ("config.json", ("vision_config", "backbone_config", "global_attention_blocks"), [4]),
        ("processor_config.json", ("target_size",), 1024),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_wrong_entry_loads_and_is_caught_by_the_masks(
    exported: Path, nano: LoadedModel, tmp_path: Path, file: str, keys: tuple[str, ...], value: object
) -> None:
    folder = tmp_path / "wrong"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).symlink_to(path)
    content = json.loads((exported / file).read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(content))
    try:
        overlap = in_this_process(folder, nano)
    except RuntimeError:
        return  # some entries do not even run: then the export fails with that error
    assert overlap < MIN_IOU


def test_the_right_folder_passes_where_the_wrong_ones_fail(exported: Path, nano: LoadedModel) -> None:
    assert in_this_process(exported, nano) > 0.9999


def test_weights_that_lack_a_tensor_are_not_filled_with_random_ones(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    for path in exported.iterdir():
        if path.suffix == ".json":
            (folder / path.name).symlink_to(path)
    tensors = load_file(exported / "model.safetensors")
    del tensors["no_object_pointer"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="missing_keys .*no_object_pointer"):
        Consumer(str(folder)).load("Sam2Video")


@pytest.mark.slow
def test_other_masks_fail_the_export_and_leave_nothing(
    nano: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        theirs = to_huggingface(state)
        theirs["mask_decoder.upscale_conv2.weight"] = -theirs["mask_decoder.upscale_conv2.weight"]
        return theirs

    monkeypatch.setattr(huggingface, "to_huggingface", damaged)
    with pytest.raises(UserError, match="masks of transformers overlap ours by only .*nothing was written"):
        export(nano, tmp_path / "out", case=SHORT)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_that_transformers_does_not_open_fails_with_its_reason(
    nano: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = HuggingFaceExporter.build

    def emptied(self: HuggingFaceExporter, model: LoadedModel, folder: Path) -> None:
        build(self, model, folder)
        (folder / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr(HuggingFaceExporter, "build", emptied)
    with pytest.raises(UserError, match="transformers does not load the export of random: .+"):
        export(nano, tmp_path / "out", case=SHORT)
    assert not list(tmp_path.iterdir())
