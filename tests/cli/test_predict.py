"""`medsam2 predict` as a user types it, and every command of docs/how-to/predict.md."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import write_series

from medsam2.cases.formats.volume import read_grid
from medsam2.cli.main import main
from medsam2.demo.phantoms.write import write_cases
from medsam2.model.build import load_model, save_asset
from medsam2.prompts.settings import PromptSettings

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "predict.md"


def scan(path: Path, write: Any) -> tuple[Path, np.ndarray]:
    z, y, x = np.indices((7, 48, 56))
    inside = ((z - 3) * 4.0) ** 2 + (y - 20) ** 2 + (x - 30) ** 2 < 12**2
    image = np.random.default_rng(1).normal(-60, 15, inside.shape) + 180 * inside
    return write.volume(path, image.astype(np.int16)), inside


def test_a_typed_command_writes_the_mask_of_a_ball_on_the_grid_of_its_scan(tmp_path: Path, write: Any) -> None:
    _, inside = scan(tmp_path / "scan.nii.gz", write)
    done = subprocess.run(
        [sys.executable, "-m", "medsam2.cli.main", "predict", "scan.nii.gz", "--checkpoint", "nano", "--modality", "CT",
         "--box", "3,18,8,42,32,ball", "--point", "3,30,20,1,ball", "--out", "mask.nii.gz"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, grid = read_grid(tmp_path / "mask.nii.gz"), read_grid(tmp_path / "scan.nii.gz")
    assert 2 * (found.array & inside).sum() / (found.array.sum() + inside.sum()) > 0.8
    np.testing.assert_allclose(found.affine, grid.affine)
    assert re.fullmatch(
        rf"wrote mask\.nii\.gz: ball {found.array.sum():,} voxels on 7 frames in [\d.]+ s\n", done.stdout
    )
    assert not done.stderr


def test_prompts_that_a_checkpoint_was_not_trained_with_are_said_once(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        scan(tmp_path / f"{name}.nii.gz", write)
    nano = load_model("nano")
    prompts = PromptSettings(kinds={"mask": 1}).model_dump(mode="json")
    save_asset("masks_only.safetensors", nano.sam.state_dict(), nano.spec, {"recipe": {"prompts": prompts}})
    asked = ["-c", "masks_only.safetensors", "--modality", "CT", "-o", "masks", "--recist", "3,18,20,42,20"]
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "a.nii.gz", "b.nii.gz", *asked])
    said = capsys.readouterr().err
    assert said.count("was trained with mask, not with prompts of the kind recist_box; check the masks carefully") == 1


def test_an_npz_without_masks_is_predicted(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with np.load(write.npz(tmp_path / "labelled.npz")) as arrays:
        np.savez_compressed(tmp_path / "scan.npz", imgs=arrays["imgs"], spacing=arrays["spacing"])
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "scan.npz", "-c", "nano", "--box", "6,14,12,19,15", "--out", "mask.nii.gz"])
    assert read_grid(tmp_path / "mask.nii.gz").array.shape == (12, 40, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--box 3,1,1,5,5 --direction sideways", "direction='sideways': it must be 'both', 'forward'"),
        ("--box 3,1,1,5,5 --precision fp16", "Did you mean 'bf16'"),
        ("--box 3,1,1,5,5 --axis w", "scan.axis='w': it must be 'file', 'auto'"),
        ("--box 3,1,1,5,5 --modality ct", "Did you mean 'CT'"),
        ("--box 3,1,1,5,5 --window lang", "Did you mean 'lung'"),
        ("--box 3,1,1,5,5", "scan.nii.gz: its modality is not known"),
        (
            "--box 7,1,1,5,5 --modality CT",
            "--box 7,1,1,5,5: slice 7 is outside of scan.nii.gz, which has slices 0 to 6",
        ),
        ("--modality CT", "no prompt: give --box"),
        ("--prompts absent.json", "--prompts absent.json: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_leaves_nothing_behind(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: str, message: str
) -> None:
    scan(tmp_path / "scan.nii.gz", write)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["predict", "scan.nii.gz", "-c", "nano", "-o", "mask.nii.gz", *shlex.split(arguments)])
    said = capsys.readouterr()
    assert end.value.code == 2 and message in said.err and said.err.count("\n") == 1 and not said.out
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_failures_among_several_inputs_are_named_and_end_with_status_2(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scan(tmp_path / "a.nii.gz", write)
    write.volume(tmp_path / "b.nii.gz", np.ones((2, 48, 56), np.int16))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["predict", "a.nii.gz", "b.nii.gz", "-c", "nano", "--modality", "CT", "-o", "m", "--box", "3,18,8,42,32"])
    said = capsys.readouterr()
    assert end.value.code == 2 and "wrote m/a.nii.gz" in said.out
    assert "failed: --box 3,18,8,42,32: slice 3 is outside of b.nii.gz" in said.err and "1 of 2 inputs" in said.err


def test_every_command_of_the_guide_runs(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    commands = re.findall(r"^    medsam2 (predict .*)$", text, re.MULTILINE)
    (json_block,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_cases(tmp_path / "cases", cases=1, workers=1)
    (tmp_path / "prompts.json").write_text(json_block, encoding="utf-8")
    z, y, x = np.indices((9, 48, 56))
    ball = ((z - 4) * 3.0) ** 2 + (y - 22) ** 2 + (x - 30) ** 2 < 11**2
    write_series(tmp_path / "series", (940 + 180 * ball).astype(np.int16))
    labels = read_grid(tmp_path / "cases/Dataset001_PhantomCT/labelsTr/ct_0001.nii.gz").array.copy()
    labels[:13], labels[14:] = 0, 0
    labels[labels != 2] = 0
    ct = read_grid(tmp_path / "cases/Dataset001_PhantomCT/imagesTr/ct_0001_0000.nii.gz")
    from medsam2.cases.case import Orientation
    from medsam2.cases.outputs.volume import write_mask

    write_mask(tmp_path / "slice.nii.gz", labels, Orientation(), ct.affine, ct.spacing)
    assert len(commands) >= 8
    for command in commands:
        try:
            main(shlex.split(command))
        except SystemExit as end:
            assert not end.code, f"{command}: {capsys.readouterr().err}"
    for name in ("organ.nii.gz", "overlay.mp4", "us_masks/00000.png", "lesion.dcm", "lesion.nrrd", "both.nii.gz"):
        assert (tmp_path / name).stat().st_size, name
    assert sorted(p.name for p in (tmp_path / "overlays").iterdir()) == ["endo_0001.mp4", "us_0001.mp4"]
    assert sorted(p.name for p in (tmp_path / "apart").iterdir()) == ["known.nii.gz", "organ.nii.gz"]
    joined = read_grid(tmp_path / "both.nii.gz").array
    apart = {name: read_grid(tmp_path / f"apart/{name}.nii.gz").array for name in ("organ", "known")}
    np.testing.assert_array_equal(joined > 0, (apart["organ"] | apart["known"]) > 0)
