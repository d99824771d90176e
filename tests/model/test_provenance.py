"""What a checkpoint says about itself: old files are read, hostile ones are refused with file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from medsam2.errors import UserError
from medsam2.model.build import LoadedModel, ModelSpec, build_sam, load_model
from medsam2.model.provenance import SCHEMA_VERSION, Provenance, read_provenance
from medsam2.prompts.settings import PromptSettings

NANO = ModelSpec("hiera_nano")
SPEC = NANO.to_dict()
SHA = "0" * 64
# As runs wrote it before the schema had a version.
OLD = {
    "spec": {"name": "hiera_nano", "version": "2.1", "image_size": 256},
    "start": "/home/jane/sam2.1_hiera_tiny.pt",
    "seed": 3,
    "step": 1200,
    "content_hashes": ["a", "b"],
    "datasets": {"ct": {"source": "https://example.org", "licence": ""}},
    "recipe": {"prompts": PromptSettings().model_dump(mode="json"), "schedule": {"steps": 9, "max_steps": 9}},
    "adapter": {"base": {"file": "base.pt", "sha256": SHA}, "adaptation": {"train": [], "peft": {"method": "lora"}}},
    "where": None,
    "of another version": 7,
}


def test_a_dictionary_of_an_old_checkpoint_is_read() -> None:
    provenance = read_provenance(OLD, "old.ckpt")
    assert provenance.spec == ModelSpec("hiera_nano", image_size=256) and provenance.step == 1200
    assert provenance.content_hashes == ("a", "b") and provenance.datasets["ct"]["source"] == "https://example.org"
    assert provenance.trained_prompts == PromptSettings()
    assert provenance.adapter is not None and provenance.adapter.base.file == "base.pt"
    assert provenance.recipe_part("schedule")["steps"] == 9 and provenance.recipe_part("optim") == {}


@pytest.mark.parametrize(
    ("old", "field", "expected"),
    [
        (
            {"recipe": "configs/experiment/pretrain_nano.yaml"},
            "recipe",
            {"file": "configs/experiment/pretrain_nano.yaml"},
        ),
        ({"steps_of_last_phase": 1500}, "step", 1500),
        (None, "content_hashes", ()),
    ],
)
def test_earlier_forms_are_read(old: Any, field: str, expected: Any) -> None:
    assert getattr(read_provenance(old, "old.pt"), field) == expected


def test_the_record_of_an_old_adapter_is_read() -> None:
    old = {"base": {"file": "base.pt", "sha256": SHA}, "spec": SPEC, "adaptation": {"train": []}, "step": 4}
    adapter = read_provenance(old, "medsam2.json").adapter
    assert adapter is not None and adapter.base.sha256 == SHA and adapter.adaptation.train == ()


def test_what_is_written_is_plain_and_comes_back() -> None:
    provenance = read_provenance(OLD, "old.ckpt")
    written = provenance.to_dict()
    assert written["schema_version"] == SCHEMA_VERSION and json.loads(json.dumps(written)) == written
    assert read_provenance(written, "new.ckpt") == provenance


def test_the_shipped_checkpoint_says_how_it_was_trained() -> None:
    provenance = load_model("nano").provenance
    assert provenance.step == 1500 and provenance.licence == "Apache-2.0" and provenance.versions["torch"]
    assert provenance.trained_prompts is not None and provenance.trained_prompts.kinds["box"] == 0.5


HOSTILE: dict[str, tuple[Any, str]] = {
    "list": (["x"], "dictionary"),
    "text": ("text", "dictionary"),
    "side": ({"spec": {**SPEC, "image_size": 32_000_000}}, "image_size=32000000 is too large"),
    "model": ({"spec": {"name": "hiera_huge"}}, "'hiera_huge' is unknown"),
    "spec": ({"spec": 5}, "spec=5"),
    "hashes": ({"content_hashes": 5}, "content_hashes=5"),
    "datasets": ({"datasets": "x"}, "datasets='x'"),
    "later": ({"schema_version": SCHEMA_VERSION + 1}, "schema_version=2.*update medsam2"),
    "base": ({"adapter": {"base": {"file": "../../etc/passwd", "sha256": SHA}, "adaptation": {}}}, "adapter.base.file"),
    "dot": ({"adapter": {"base": {"file": ".", "sha256": SHA}, "adaptation": {}}}, "adapter.base.file"),
    "method": (
        {"adapter": {"base": {"file": "a", "sha256": SHA}, "adaptation": {"peft": {"method": "x"}}}},
        "peft.method",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_provenance_is_refused_with_file_and_field(name: str, tmp_path: Path) -> None:
    values, message = HOSTILE[name]
    path = tmp_path / "hostile.pt"
    torch.save({"model": build_sam(NANO).state_dict(), "medsam2": values}, path)
    with pytest.raises(UserError, match=rf"hostile\.pt.*{message}"):
        load_model(path)


@pytest.mark.parametrize("header", ["{", "[" * 100_000, '{"content_hashes": 5}'])
def test_a_header_that_is_no_provenance_is_refused(header: str, tmp_path: Path) -> None:
    save_file(build_sam(NANO).state_dict(), tmp_path / "hostile.safetensors", metadata={"medsam2": header})
    with pytest.raises(UserError, match=r"hostile\.safetensors"):
        load_model(tmp_path / "hostile.safetensors")


def test_prompts_that_are_no_settings_are_named() -> None:
    with pytest.raises(UserError, match=r"recipe\.prompts.*'bax'"):
        _ = Provenance(recipe={"prompts": {"bax": 1.0}}).trained_prompts


# ------------------------------------------------------------------------------------------------ damaged weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "weights.pt"
    torch.save({"model": build_sam(NANO).state_dict()}, path)
    return path


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_one_flipped_bit_is_noticed(saved: Path, share: float, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[int(share * len(content))] ^= 0x40
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"flipped\.pt is (damaged|not a readable)"):
        load_model(tmp_path / "flipped.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_weights_are_refused_by_name(value: float, tmp_path: Path) -> None:
    state = build_sam(NANO).state_dict()
    state["no_mem_embed"][0, 0, 3] = value
    torch.save({"model": state}, tmp_path / "diverged.pt")
    with pytest.raises(UserError, match=r"no_mem_embed has values that are not finite.*previous\.ckpt"):
        load_model(tmp_path / "diverged.pt")


def test_a_loaded_model_without_a_word_about_itself_has_an_empty_provenance(saved: Path) -> None:
    model = load_model(saved)
    assert isinstance(model, LoadedModel) and model.provenance == Provenance()
