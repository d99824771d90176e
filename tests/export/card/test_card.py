"""The model card: what it says comes from the checkpoint, the check and an evaluation, and nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from medsam2.errors import UserError
from medsam2.evaluation.run.checkpoints import weights_hash
from medsam2.evaluation.statistics.summary import summarise
from medsam2.export.card.card import licence, model_card
from medsam2.export.formats.adapter import AdapterExporter
from medsam2.export.formats.sam2 import Sam2Exporter
from medsam2.export.targets import TARGETS
from medsam2.model.build import LoadedModel, ModelSpec, build_sam
from medsam2.model.provenance import Provenance
from medsam2.prompts.settings import PromptSettings

DATASETS = {"ct": {"source": "https://example.org/a|b", "licence": "CC-BY-4.0"}, "us": {"source": "", "licence": ""}}
METADATA: dict[str, Any] = {
    "start": "/home/jane/weights/sam2.1_hiera_tiny.pt",
    "seed": 3,
    "step": 1200,
    "content_hashes": ["a", "b"],
    "datasets": DATASETS,
    "recipe": {
        "adaptation": {"train": ["mask_decoder"], "peft": None},
        "optim": {"lr": 4e-4, "weight_decay": 0.02},
        "prompts": {
            **PromptSettings().model_dump(mode="json"),
            "kinds": {"mask": 0.0, "box": 0.75, "click": 0.25},
            "corrections": 2,
        },
    },
}
CHECK = {
    "verified": True, "clip": "case 7 (liver)", "frames": 9, "objects": 2, "max_logit_difference": 0.00012,
    "max_score_difference": 2e-6, "iou": 1.0, "foreground": 0.1, "loaded": "strictly, by transformers",
    "items": {"image, boxes": {"max_logit_difference": 1e-5, "iou": 1.0}},
}  # fmt: skip


@pytest.fixture(scope="module")
def sam() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_sam(ModelSpec("hiera_nano")).eval()


def card(sam: Any, reports: Any = None, scores: Path | None = None, **metadata: Any) -> str:
    """The card of an official export; `reports` by format, of which one that was not verified is the default."""
    source = "/home/jane/runs/first/checkpoints/best.ckpt"
    model = LoadedModel(sam, ModelSpec("hiera_nano"), Provenance.model_validate(metadata), source)
    reports = reports or {"sam2": {"verified": False}}
    return model_card(model, Path(), dict.fromkeys(reports, Sam2Exporter()), reports, scores)


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def evaluation(folder: Path, sam: Any, weights: str = "", leaks: int = 0) -> Path:
    """summary.json of two checkpoints ("before" is of other weights), its groups made by the evaluation's own code."""
    rows = []
    for label, gain in (("before", 0.0), ("after", 0.2)):
        for patient in range(12):
            score = 0.5 + gain + 0.01 * patient
            rows.append(
                {"checkpoint": label, "dataset": "ct", "modality": "CT", "kind": "volume", "case": f"c{patient}",
                 "patient": f"p{patient}", "structure": "liver", "object": 0, "frames": 9, "leak": False, "dsc": score,
                 "iou": score, "nsd": score, "voxels": 10, "voxels_predicted": 10, "voxels_both": 5, "seconds": 1.0,
                 "peak_mb": 1.0}
            )  # fmt: skip
    own = weights or weights_hash(sam.state_dict().items())
    summary = {
        "source": "/data/shards", "split": "val", "bootstrap": {"seed": 0, "resamples": 200, "level": 0.95},
        "checkpoints": ["before", "after"], "metrics": {"nsd_mm": 1.5, "nsd_px": 3.0}, "leaks": {"after": leaks},
        "models": [
            {"label": "before", "name": "nano", "weights": "0"}, {"label": "after", "name": "run", "weights": own}
        ],
        "protocols": [{"protocol": {"name": "largest_box", "prompt": "box", "slices": "largest", "direction": "both"},
                       "outside": {"before": "not trained with boxes"},
                       "groups": summarise(pd.DataFrame(rows), ["before", "after"], 0, 200)}],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


# ---------------------------------------------------------------------------------------------------- its parts


def test_front_matter_is_yaml_that_a_hub_reads(sam: Any) -> None:
    start, front, rest = card(sam, **METADATA).split("---\n", 2)
    data = yaml.safe_load(front)
    assert not start and rest.lstrip().startswith("# SAM 2.1 `hiera_nano` at 128 px, for Meta's code")
    assert data["license"] == "other" and data["license_name"] and data["pipeline_tag"] == "mask-generation"
    assert data["library_name"] == "sam2" and {"medical-imaging", "sam2"} <= {*data["tags"]}


@pytest.mark.parametrize("title", ["Use", "Check", "Training data", "Recipe", "Prompts", "Scores", "Licence"])
def test_every_part_is_there_even_where_nothing_is_known(sam: Any, title: str) -> None:
    assert section(card(sam), title).strip()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_format_has_its_files_and_lines_that_compile(
    sam: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"file": "base.pt", "sha256": "0" * 64}
    monkeypatch.setattr(AdapterExporter, "describe", lambda *_: {"method": "lora", "base": base, "megabytes": 1.0})
    model = LoadedModel(sam, ModelSpec("hiera_nano"))
    text = model_card(model, Path(), {name: TARGETS[name].exporter()}, {name: {"verified": False}})
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert blocks and all(compile(block, "README.md", "exec") for block in blocks)
    assert text.split("## Use")[0].count("\n| `") >= 3 and "| `verify.json` |" in text


def test_no_folder_of_whoever_trained_is_told(sam: Any) -> None:
    text = card(sam, **METADATA)
    assert "jane" not in text and "`best.ckpt`" in text and "sam2.1_hiera_tiny.pt" in section(text, "Recipe")


def test_datasets_have_source_and_licence_or_say_that_none_is_stated(sam: Any) -> None:
    text = section(card(sam, **METADATA), "Training data")
    assert "| ct | https://example.org/a\\|b | CC-BY-4.0 |\n| us | not stated | not stated |\n" in text
    assert "2 training cases" in text


def test_names_of_datasets_are_no_html(sam: Any) -> None:
    text = card(sam, datasets={"<script>alert(1)</script>": {"source": "<img onerror=x>", "licence": "MIT"}})
    assert "<script>" not in text and "<img" not in text and "&lt;script>" in text


def test_recipe_names_start_steps_and_rate(sam: Any) -> None:
    text = section(card(sam, **METADATA), "Recipe")
    for row in ("optimiser steps | 1200", "learning rate | 0.0004", "trained | mask_decoder", "seed | 3"):
        assert f"| {row} |" in text


def test_a_merged_adapter_is_named(sam: Any) -> None:
    recipe = {"adaptation": {"train": [], "peft": {"method": "lora", "r": 8, "targets": ["image_encoder"]}}}
    assert "| trained | lora of rank 8 on image_encoder, merged here |" in section(card(sam, recipe=recipe), "Recipe")


def test_prompts_that_were_not_trained_are_named_as_such(sam: Any) -> None:
    text = section(card(sam, **METADATA), "Prompts")
    assert "| box | 75 % |" in text and "| one click | 25 % |" in text and "up to 2 on a frame" in text
    assert "| mask of one frame | none: do not rely on it |" in text
    assert "does not say which prompts" in section(card(sam), "Prompts")


def test_no_verify_is_recorded_and_a_check_is_told_with_its_numbers(sam: Any) -> None:
    assert section(card(sam), "Check").strip() == "Not verified (`--no-verify`)."
    told = section(card(sam, {"sam2": CHECK}), "Check")
    assert "strictly, by transformers" in told and "case 7 (liver)" in told and "0.00012" in told
    assert "| image, boxes | 1e-05 | 1.00000 |" in told
    assert "prove little" in section(card(sam, {"sam2": {**CHECK, "foreground": 0.0}}), "Check")


def test_a_release_tells_the_check_of_each_format(sam: Any) -> None:
    onnx = {**CHECK, "loaded": "without PyTorch", "iou": 0.99991}
    text = card(sam, {"sam2": CHECK, "onnx": onnx})
    told = section(text, "Check")
    assert "run on case 7 (liver)" in told
    assert "| `sam2` | strictly, by transformers | 0.00012 | 2e-06 | 1.00000 |" in told
    assert "| `onnx` | without PyTorch | 0.00012 | 2e-06 | 0.99991 |" in told
    assert "### sam2/" in text and "### onnx/" in text
    assert "Not verified (`--no-verify`)." in card(sam, {"sam2": CHECK, "onnx": {"verified": False}})


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"licence": "Apache-2.0"}, "apache-2.0"),
        ({"datasets": {"a": {"licence": "CC-BY-4.0"}, "b": {"licence": "MIT"}}}, "apache-2.0"),
        ({"datasets": {"a": {"licence": "CC-BY-NC-4.0"}}}, "other"),
        ({"datasets": {"a": {"licence": ""}}}, "other"),
        ({}, "other"),
    ],
)
def test_licence_is_open_only_where_all_data_allow_it(metadata: dict[str, Any], expected: str) -> None:
    assert licence(Provenance.model_validate(metadata)) == expected


def test_the_official_card_tells_how_to_mend_the_image_predictor(sam: Any) -> None:
    assert "_bb_feat_sizes = [(32, 32), (16, 16), (8, 8)]" in card(sam)


# ---------------------------------------------------------------------------------------------------- scores


def test_scores_are_of_these_weights_with_their_intervals(sam: Any, tmp_path: Path) -> None:
    text = section(card(sam, None, evaluation(tmp_path, sam)), "Scores")
    row = next(line for line in text.splitlines() if line.startswith("| ct | CT | liver |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:5] == ["12", "12"]
    mean, low, high = (float(word) for word in cells[5].replace("(", "").replace(")", "").replace("to ", "").split())
    assert mean == pytest.approx(0.755) and 0.7 < low < mean < high < 0.81
    assert (
        "### largest_box (box, slices: largest, direction: both)" in text
        and "1.5 mm" in text
        and "3 px" in text
        and "shards" in text
    )
    assert "/data" not in text and "not trained with boxes" not in text, "that is of the other checkpoint"


def test_scores_of_other_weights_are_refused(sam: Any, tmp_path: Path) -> None:
    folder = evaluation(tmp_path, sam, weights="1234")
    with pytest.raises(UserError, match=r"other weights than .*best.ckpt: before \(nano\), after \(run\)"):
        card(sam, None, folder)


def test_cases_that_were_trained_on_are_told(sam: Any, tmp_path: Path) -> None:
    text = card(sam, None, evaluation(tmp_path, sam, leaks=2))
    assert "**2 of these cases were in the training" in text


@pytest.mark.parametrize("content", [None, "{", "[]", '{"groups": []}'])
def test_what_is_no_evaluation_is_refused(sam: Any, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"--scores .*(evaluate\.py|evaluate again)"):
        card(sam, None, tmp_path)
