"""Several formats at once, releases, and the variants of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medsam2.errors import UserError
from medsam2.export.formats.graphs import TorchExporter
from medsam2.export.run import draft_folder, export_model
from medsam2.export.targets import TARGETS, split_names
from medsam2.export.variants import load_variant
from medsam2.model.build import load_model


def averaged(folder: Path) -> Path:
    """A checkpoint as Lightning writes it of a run with a moving average: its zeros, the step's weights as they are."""
    loaded = load_model("nano")
    current = {f"tracker.sam.{key}": value for key, value in loaded.sam.state_dict().items()}
    average = {key: value * 0.5 for key, value in current.items()}
    content = {
        "state_dict": average, "current_model_state": current, "averaging_state": {"n_averaged": torch.tensor(4)},
        "medsam2": {"spec": loaded.spec.to_dict(), "content_hashes": [], "step": 4},
    }  # fmt: skip
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def code_blocks(text: str) -> list[str]:
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def run(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------- formats


def test_formats_are_given_by_several_options_or_commas() -> None:
    assert split_names(["sam2", "onnx"]) == split_names(["sam2,onnx", "sam2"]) == ["sam2", "onnx"]
    assert split_names(["all"]) == ["all"]
    with pytest.raises(UserError, match="--to all is every format; leave out onnx"):
        split_names(["all,onnx"])
    with pytest.raises(UserError, match="Did you mean 'onnx'"):
        split_names(["sam2,onx"])


@pytest.fixture
def sam2_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of the quickest format, since graphs take half a minute."""
    monkeypatch.setattr("medsam2.export.run.TARGETS", {"sam2": TARGETS["sam2"]})


def test_a_release_has_the_adapter_only_where_there_is_one() -> None:
    model = load_model("nano")
    assert [name for name, target in TARGETS.items() if not target.exporter().supports(model)] == ["adapter"]


@pytest.mark.usefixtures("sam2_alone")
def test_a_release_has_checksums_licence_and_a_card_with_the_lines_of_each_format(tmp_path: Path) -> None:
    out = tmp_path / "release"
    export_model("nano", "all", out, verify=False)
    assert sorted(path.name for path in out.iterdir()) == ["LICENSE", "README.md", "SHA256SUMS", "sam2"]
    sums = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert sums.keys() == files.keys() - {"SHA256SUMS"}
    assert all(hashlib.sha256(files[name].read_bytes()).hexdigest() == digest for name, digest in sums.items())
    assert "Apache License" in (out / "LICENSE").read_text()
    assert "Not verified" in (out / "README.md").read_text()
    # Other tests run these lines.
    assert code_blocks((out / "README.md").read_text()) == code_blocks((out / "sam2" / "README.md").read_text()) != []


@pytest.mark.slow
def test_each_format_of_a_whole_release_runs_as_its_card_says(tmp_path: Path) -> None:
    out = tmp_path / "release"
    results = export_model("nano", "all", out)
    assert all(result.verified and result.report["iou"] >= 0.95 for result in results)
    for part in (out / "README.md").read_text().split("\n### ")[1:]:
        run("\n".join(code_blocks(part)), out / part.split("/")[0])


def test_what_is_there_stays_and_force_replaces_only_its_own_folders(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "sam2").mkdir()
    (tmp_path / "sam2" / "old.pt").write_text("old")
    with pytest.raises(UserError, match="not empty.*--force"):
        export_model("nano", ["sam2", "huggingface"], tmp_path, verify=False)
    export_model("nano", ["sam2", "huggingface"], tmp_path, force=True, verify=False)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "sam2" / "old.pt").exists() and (tmp_path / "sam2" / "medsam2_nano_128.pt").exists()


def test_one_format_that_fails_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("graphs differ")

    monkeypatch.setattr(TorchExporter, "build", fail)
    with pytest.raises(UserError, match="graphs differ"):
        export_model("nano", ["sam2", "torch"], tmp_path / "out", verify=False)
    assert not list(tmp_path.iterdir())


def test_drafts_of_killed_exports_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    killed = tmp_path / ".out.killed.partial"
    killed.mkdir()
    (killed / "weights.pt").write_text("half")
    with draft_folder(tmp_path / "out") as living, draft_folder(tmp_path / "out") as other:
        assert living.is_dir() and other.is_dir() and not killed.exists()
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- variants


def test_raw_weights_and_the_average_of_one_checkpoint(tmp_path: Path) -> None:
    path, key = averaged(tmp_path), "sam_mask_decoder.iou_token.weight"
    nano = load_model("nano").sam.state_dict()[key]
    raw, ema, plain = (load_variant(path, weights) for weights in ("raw", "ema", None))
    assert torch.equal(raw.sam.state_dict()[key], nano)
    assert torch.equal(ema.sam.state_dict()[key], nano * 0.5)
    assert torch.equal(plain.sam.state_dict()[key], nano * 0.5)
    assert "not averaged" in str(raw.provenance.weights) and ema.provenance.weights == "moving average"
    with pytest.raises(UserError, match="--to adapter writes the adapter as the checkpoint has it"):
        export_model(raw, "adapter", tmp_path / "out")


def test_weights_of_a_checkpoint_without_an_average_are_one_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--weights raw: .*one set of weights"):
        load_variant("nano", "raw")
    with pytest.raises(UserError, match=r"--weights 'exa' is not one of ema, raw.*Did you mean 'ema'"):
        load_variant("nano", "exa")


def test_bfloat16_rounds_the_weights_and_halves_the_file(tmp_path: Path) -> None:
    rounded = load_variant("nano", dtype="bf16")
    for name, loaded in (("full", load_model("nano")), ("half", rounded)):
        export_model(loaded, "sam2", tmp_path / name, verify=False)
    full, half = (tmp_path / name / "medsam2_nano_128.pt" for name in ("full", "half"))
    assert half.stat().st_size < 0.53 * full.stat().st_size
    stored = torch.load(half, weights_only=True)["model"]
    assert all(value.dtype == torch.bfloat16 for value in stored.values())
    assert all(torch.equal(value.float(), rounded.sam.state_dict()[key]) for key, value in stored.items())
    back = load_model(tmp_path / "half")
    assert all(value.dtype == torch.float32 for value in back.sam.state_dict().values())
    assert "bfloat16 weights" in (tmp_path / "half" / "README.md").read_text()


def test_another_side_changes_the_yaml_and_not_the_weights(tmp_path: Path) -> None:
    loaded = load_variant("nano", image_size=160)
    export_model(loaded, "sam2", tmp_path / "out", verify=False)
    state = torch.load(tmp_path / "out" / "medsam2_nano_160.pt", weights_only=True)
    assert "image_size: 160" in (tmp_path / "out" / "medsam2_nano_160.yaml").read_text()
    assert state["medsam2"]["trained_image_size"] == 128
    own = load_model("nano").sam.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in state["model"].items())
    assert json.loads((tmp_path / "out" / "verify.json").read_text()) == {"verified": False}
