"""The official export: Meta's code loads it strictly and gives our masks, or nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_shards import SCANS, build

from medsam2.errors import UserError
from medsam2.export.formats.exporter import shareable
from medsam2.export.formats.sam2 import Sam2Exporter
from medsam2.export.run import ExportResult, export_model
from medsam2.export.verify.clip import clip_of_case
from medsam2.model.build import LoadedModel, ModelSpec, build_sam, load_model

SPEC = ModelSpec("hiera_nano")
DATASETS = {
    "ct": {"source": "https://example.org/a|b", "licence": "CC-BY-4.0"},
    "us": {"source": "", "licence": ""},
}


def export_official(checkpoint: Any, out: Path, **options: Any) -> ExportResult:
    return export_model(checkpoint, "sam2", out, **options)[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano of random weights whose masks are neither empty nor full, as a training run writes it."""
    torch.manual_seed(0)
    sam = build_sam(SPEC)
    with torch.no_grad():
        sam.sam_mask_decoder.pred_obj_score_head.layers[2].bias += 2
        for head in sam.sam_mask_decoder.output_hypernetworks_mlps:
            head.layers[2].weight *= 30
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    metadata = {"spec": SPEC.to_dict(), "content_hashes": ["a"], "where": None, "datasets": DATASETS}
    torch.save({"state_dict": {f"tracker.sam.{k}": v for k, v in sam.state_dict().items()}, "medsam2": metadata}, path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "official"
    export_official(checkpoint, out)
    return out


def test_export_has_its_four_files_named_without_dots(exported: Path) -> None:
    names = sorted(path.name for path in exported.iterdir())
    assert names == ["README.md", "medsam2_nano_128.pt", "medsam2_nano_128.yaml", "verify.json"]


def test_official_predictor_gives_our_logits(exported: Path) -> None:
    report = json.loads((exported / "verify.json").read_text())
    assert set(report["items"]) == {
        "propagation from boxes, both ways", "propagation from a click", "propagation from a mask", "image, boxes",
        "image, click, three masks", "image, click on an earlier mask",
    }  # fmt: skip
    assert "without medsam2" in report["loaded"] and report["objects"] == 2
    assert 0.02 < report["foreground"] < 0.98 and report["compared"] > 0.5, "the comparison proves nothing"
    assert report["verified"] and report["iou"] >= 0.999
    assert report["max_logit_difference"] < 1e-3 and report["max_score_difference"] < 1e-3


def test_weights_are_float32_official_keys_beside_plain_values(exported: Path, checkpoint: Path) -> None:
    content = torch.load(exported / "medsam2_nano_128.pt", weights_only=True)
    assert set(content) == {"model", "medsam2"}
    original = load_model(checkpoint).sam.state_dict()
    assert list(content["model"]) == list(original)
    assert all(value.dtype == torch.float32 for value in content["model"].values())
    assert all(torch.equal(value, original[key]) for key, value in content["model"].items())
    assert content["medsam2"]["content_hashes"] == ["a"] and content["medsam2"]["datasets"] == DATASETS
    assert json.loads(json.dumps(content["medsam2"])) == content["medsam2"]


def test_the_card_names_source_and_licence_of_the_training_data(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "| ct | https://example.org/a\\|b | CC-BY-4.0 |\n| us | not stated | not stated |\n" in card


def test_export_loads_back_with_its_size(exported: Path) -> None:
    assert load_model(exported).spec == SPEC


def test_yaml_needs_no_other_file(exported: Path) -> None:
    text = (exported / "medsam2_nano_128.yaml").read_text()
    assert text.startswith("# @package _global_") and "defaults" not in yaml.safe_load(text)


def test_yaml_composes_with_the_changes_that_medsam2s_loader_makes(exported: Path) -> None:
    from hydra import compose, initialize_config_dir

    from medsam2.config import preserve_hydra_state

    changes = [
        "++model._target_=sam2.sam2_video_predictor_npz.SAM2VideoPredictorNPZ",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
        "++model.binarize_mask_from_pts_for_mem_enc=true",
        "++model.fill_hole_area=8",
    ]
    with preserve_hydra_state(), initialize_config_dir(str(exported), version_base="1.2"):
        model = compose("medsam2_nano_128.yaml", overrides=changes).model
    assert model._target_.endswith("SAM2VideoPredictorNPZ") and model.image_size == 128
    plain = yaml.safe_load((exported / "medsam2_nano_128.yaml").read_text())  # as the 3D Slicer server reads it
    assert plain["model"]["image_size"] == 128
    assert all(path.name.count(".") == 1 for path in exported.iterdir()), "the plugin cuts names at the first dot"


def test_lines_of_the_card_run_in_a_fresh_process(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    code = "\n".join(part.split("```")[0] for part in card.split("```python\n")[1:])
    code += """
import numpy as np
image_predictor.set_image(np.zeros((90, 120, 3), np.uint8))
masks, scores, _ = image_predictor.predict(box=np.array([10, 10, 60, 60]), multimask_output=False)
assert masks.shape == (1, 90, 120) and predictor.image_size == 128
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_tiny_at_512_px_loads_strictly_in_the_official_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "sam2.1_hiera_tiny.pt"
    torch.save({"model": build_sam(ModelSpec("hiera_tiny")).state_dict(), "medsam2": {
        "spec": ModelSpec("hiera_tiny", image_size=512).to_dict()}}, source)  # fmt: skip
    result = export_official(source, tmp_path / "out", verify=False)
    assert "medsam2_tiny_512.pt" in result.files and not result.verified
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not verified" in card and "names no dataset" in card
    lines = card.split("```python\n")[1].split("```")[0] + "\nassert predictor.image_size == 512"
    done = subprocess.run([sys.executable, "-c", lines], cwd=result.folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def medsam2(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medsam2.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_masks_are_compared_on_a_held_out_case_of_shards(checkpoint: Path, tmp_path: Path) -> None:
    shards = build(tmp_path / "shards", SCANS)
    clip = clip_of_case(str(shards))
    assert clip.frames.dtype == torch.uint8 and len(clip.prompts) == 1
    assert export_official(checkpoint, tmp_path / "out", case=clip).report["clip"] == clip.name
    key = clip.name.split(" ")[0]
    assert clip_of_case(f"{shards}:{key}").name == clip.name
    with pytest.raises(UserError, match=f"Did you mean '{key}'"):
        clip_of_case(f"{shards}:{key}1")


# ------------------------------------------------------------------------------------------------ refusals


def test_existing_folder_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="--force"):
        export_official(checkpoint, tmp_path, verify=False)
    export_official(checkpoint, tmp_path, force=True, verify=False)
    assert (tmp_path / "mine.txt").read_text() == "mine" and (tmp_path / "verify.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "sam_mask_decoder.output_upscaling.3.weight",
            "masks of Meta's code overlap ours by only .*nothing was written",
        ),
        ("no_mem_embed", "Meta's code does not load the export of .*nothing was written"),
    ],
    ids=["other masks", "a missing tensor"],
)
def test_a_damaged_export_fails_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    build = Sam2Exporter.build

    def damaged(self: Sam2Exporter, model: LoadedModel, folder: Path) -> None:
        build(self, model, folder)
        path = folder / "medsam2_nano_128.pt"
        content = torch.load(path, weights_only=True)
        weight = content["model"].pop(name)
        if name != "no_mem_embed":
            content["model"][name] = -weight
        torch.save(content, path)

    monkeypatch.setattr(Sam2Exporter, "build", damaged)
    with pytest.raises(UserError, match=message):
        export_official(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_line_exports_and_reports(checkpoint: Path, tmp_path: Path) -> None:
    run, out = str(checkpoint.parent.parent), str(tmp_path / "out")
    done = medsam2("export", "--checkpoint", run, "--to", "sam2", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "largest difference of mask logits" in done.stdout


def test_no_path_of_the_machine_is_exported() -> None:
    model = load_model("nano")
    for start in ("/home/jane/smith_case/best.ckpt", r"C:\Users\jane\best.ckpt"):
        changed = model.provenance.model_copy(update={"start": start})
        assert shareable(replace(model, provenance=changed)).start == "best.ckpt"
