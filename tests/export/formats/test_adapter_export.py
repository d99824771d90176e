"""The adapter export: peft's own code loads it onto its base alone, and gives the masks of the trained model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medsam2.adaptation.adapter import (
    adapter_provenance,
    find_base,
    is_adapter_folder,
    load_adapter,
    load_merged,
    read_record,
    tensor_digest,
)
from medsam2.adaptation.freeze import AdaptationSettings, apply_adaptation
from medsam2.adaptation.lora import PeftSettings, merge, official_state
from medsam2.errors import UserError
from medsam2.export.formats import adapter as exporting
from medsam2.export.run import ExportResult, export_model
from medsam2.model.build import ModelSpec, build_sam, load_model
from medsam2.model.checkpoint import read_checkpoint
from medsam2.model.provenance import Provenance

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "medsam2.json", "verify.json"]
# LoRA and DoRA alone, and LoRA beside parts that are trained in full, a bare parameter among them.
RECIPES = {
    "lora": AdaptationSettings(train=(), peft=PeftSettings(targets=("image_encoder", "memory_attention"))),
    "dora": AdaptationSettings(train=(), peft=PeftSettings(method="dora", targets=("mask_decoder",))),
    "mixed": AdaptationSettings(
        train=("mask_decoder", "maskmem_tpos_enc", r"image_encoder\..*norm1"),
        peft=PeftSettings(targets=("image_encoder",), r=4),
    ),
}


def export_adapter(checkpoint: Any, out: Path, **options: Any) -> ExportResult:
    return export_model(checkpoint, "adapter", out, **options)[0]


def read_adapted(run: Path) -> Any:
    return exporting.read_adapted(load_model(run))


def checkpoint(folder: Path, recipe: AdaptationSettings) -> Path:
    """What a run of the shipped nano writes: an adapted state, and what the checkpoint says about itself."""
    torch.manual_seed(0)
    loaded = load_model("nano")
    apply_adaptation(loaded.sam, recipe)
    adapter = adapter_provenance(loaded.sam, recipe, loaded.source)
    with torch.no_grad():
        for parameter in loaded.sam.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    state = {f"tracker.sam.{key}": value for key, value in loaded.sam.state_dict().items()}
    provenance = Provenance(spec=loaded.spec, content_hashes=("a",), step=7, start="/home/jane/x.pt", adapter=adapter)
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": state, "medsam2": provenance.to_dict()}, path)
    return path


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name != "lora" else name for name in RECIPES]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint(folder, RECIPES[request.param])
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export_adapter(run, run / "adapter")
    return run / "adapter"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("only_lora")
    checkpoint(folder, RECIPES["lora"])
    export_adapter(folder, folder / "adapter", verify=False)
    return folder


# ------------------------------------------------------------------------------------------------ round trips


def test_an_adapter_folder_has_no_second_set_of_weights(exported: Path) -> None:
    with pytest.raises(UserError, match="--weights: .* is an adapter with one set of weights"):
        load_model(exported, averaged=True)


def test_peft_gave_the_masks_of_the_trained_model(exported: Path) -> None:
    report = json.loads((exported / "verify.json").read_text())
    assert report["verified"] and sorted(path.name for path in exported.iterdir()) == FILES
    assert 0.02 < report["foreground"] < 0.98, "the comparison proves nothing"
    assert report["iou"] >= 0.999 and report["max_logit_difference"] < 1e-3


@pytest.mark.slow
def test_plain_peft_and_metas_code_load_it_in_a_fresh_process(run: Path, exported: Path, tmp_path: Path) -> None:
    export_model("nano", "sam2", tmp_path / "base", verify=False)
    expected = tmp_path / "expected.safetensors"
    save_file({key: value.contiguous() for key, value in official_state(read_adapted(run)).items()}, str(expected))
    code = f"""
import sys
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from sam2.build_sam import build_sam2
from peft import PeftModel
from safetensors.torch import load_file

GlobalHydra.instance().clear()
with initialize_config_dir({str(tmp_path / "base")!r}, version_base="1.2"):
    model = build_sam2("medsam2_nano_128.yaml", {str(tmp_path / "base" / "medsam2_nano_128.pt")!r}, device="cpu")
model = PeftModel.from_pretrained(model, {str(exported)!r}).merge_and_unload()
expected, found = load_file({str(expected)!r}), model.state_dict()
assert list(found.keys() ^ expected.keys()) == []
assert all((found[key] - value).abs().max() <= 1e-6 for key, value in expected.items())
assert not any(name.split(".")[0] == "medsam2" for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_loading_it_onto_its_base_gives_the_trained_weights(run: Path, exported: Path) -> None:
    base = load_model(find_base(exported, read_record(exported)))
    load_adapter(exported, base.sam, base.spec)
    trained = {name for name, value in base.sam.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in read_adapted(run).named_parameters() if value.requires_grad}
    merge(base.sam)
    expected = official_state(read_adapted(run))
    assert all(torch.equal(value, expected[key]) for key, value in base.sam.state_dict().items())
    assert is_adapter_folder(exported)
    stated = load_model(exported).provenance
    assert (stated.spec, stated.content_hashes, stated.step, stated.adapter) == (base.spec, ("a",), 7, None)


def test_a_checkpoint_with_an_adapter_fills_a_plain_network(run: Path) -> None:
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    sam = build_sam(ModelSpec("hiera_nano"))
    assert load_merged(sam, content.state, content.provenance, "last.ckpt")
    expected = official_state(read_adapted(run))
    assert all(torch.equal(value, expected[key]) for key, value in sam.state_dict().items())
    assert not load_merged(sam, sam.state_dict(), Provenance(), "plain.pt")


def test_it_is_small_and_holds_no_base_weights(lora: Path) -> None:
    weights = lora / "adapter" / "adapter_model.safetensors"
    assert weights.stat().st_size < 1.1e6
    assert all("lora_" in name for name in load_file(weights))
    config = json.loads((lora / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"] and config["r"] == 8


def test_the_record_names_the_base_without_its_folder(lora: Path) -> None:
    record = json.loads((lora / "adapter" / "medsam2.json").read_text())
    digest = tensor_digest(load_model("nano").sam.state_dict())
    assert record["adapter"]["base"] == {"file": "hiera_nano.safetensors", "sha256": digest}
    told = (lora / "adapter" / "README.md").read_text() + json.dumps(record)
    assert str(lora) not in told and "jane" not in told and digest in told


def test_the_digest_is_of_the_weights_not_of_the_file(tmp_path: Path) -> None:
    sam = load_model("nano").sam
    torch.save({"model": sam.state_dict()}, tmp_path / "again.pt")
    assert tensor_digest(load_model(tmp_path / "again.pt").sam.state_dict()) == tensor_digest(sam.state_dict())
    with torch.no_grad():
        sam.no_mem_embed[0, 0, 0] += 1e-3
    assert tensor_digest(load_model(tmp_path / "again.pt").sam.state_dict()) != tensor_digest(sam.state_dict())


def test_the_base_is_found_in_or_beside_the_folder(lora: Path, tmp_path: Path) -> None:
    record = read_record(lora / "adapter")
    assert record.adapter is not None
    base = record.adapter.base.model_copy(update={"file": "sam2.1_hiera_tiny.pt"})
    other = record.model_copy(update={"adapter": record.adapter.model_copy(update={"base": base})})
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(UserError, match=r"sam2.1_hiera_tiny.pt, which is neither"):
        find_base(folder, other)
    (tmp_path / "sam2.1_hiera_tiny.pt").touch()
    assert find_base(folder, other) == str(tmp_path / "sam2.1_hiera_tiny.pt")
    assert find_base(folder, record) == "nano"


# ------------------------------------------------------------------------------------------------ refusals


def test_another_base_is_refused(lora: Path) -> None:
    other = build_sam(ModelSpec("hiera_nano"))
    with pytest.raises(UserError, match=r"an adapter for hiera_nano.safetensors.*these weights have"):
        load_adapter(lora / "adapter", other, ModelSpec("hiera_nano"))
    with pytest.raises(UserError, match=r"for hiera_nano 2.1, not for hiera_tiny 2.1"):
        load_adapter(lora / "adapter", other, ModelSpec("hiera_tiny"))


def test_a_run_without_an_adapter_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for source in ("nano", str(tmp_path / "plain.pt")):
        torch.save({"model": load_model("nano").sam.state_dict()}, tmp_path / "plain.pt")
        with pytest.raises(UserError, match="no adapter.*--to sam2"):
            export_adapter(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_say_how_it_was_adapted_is_refused(lora: Path, tmp_path: Path) -> None:
    content = torch.load(lora / "checkpoints" / "last.ckpt", weights_only=True)
    del content["medsam2"]["adapter"]
    torch.save(content, tmp_path / "anonymous.ckpt")
    with pytest.raises(UserError, match="has an adapter without settings"):
        export_adapter(tmp_path / "anonymous.ckpt", tmp_path / "out")


@pytest.mark.slow
def test_files_that_give_other_masks_fail_the_export_and_leave_nothing(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = exporting.save_adapter

    def damaged(folder: Path, *rest: object) -> None:
        save(folder, *rest)  # type: ignore[arg-type]
        path = folder / "adapter_model.safetensors"
        save_file({key: value * 30 for key, value in load_file(path).items()}, str(path))

    monkeypatch.setattr(exporting, "save_adapter", damaged)
    with pytest.raises(UserError, match="masks of peft overlap ours by only"):
        export_adapter(lora, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_foreign_folder_is_refused_by_name(lora: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(UserError, match="has no medsam2.json"):
        read_record(folder)
    good = lora / "adapter"
    text = (good / "medsam2.json").read_text()
    (folder / "medsam2.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="medsam2.json is damaged"):
        read_record(folder)
    (folder / "medsam2.json").write_text(text)
    weights = (good / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    base = load_model("nano")
    with pytest.raises(UserError, match="adapter_model.safetensors is not a readable"):
        load_adapter(folder, base.sam, base.spec)
