"""`medsam2 clips` as a user types it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from medsam2.cli.clips import clips
from medsam2.cli.main import main
from medsam2.data.pictures import FRAME_SIDE, Clip, sheet
from medsam2.reporting.overlays import GAP
from medsam2.reporting.style import OBJECTS, rgb

app = typer.Typer()
app.command()(clips)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_every_modality_gets_a_picture_with_outlines(shards: Path, tmp_path: Path):
    result = run(shards, "--out", tmp_path / "new" / "pictures", "--clips", 4)
    assert result.exit_code == 0, result.output
    written = sorted((tmp_path / "new" / "pictures").iterdir())
    assert written and [str(path) for path in written] == result.stdout.split()
    assert all(path.name.startswith("clips-") and path.suffix == ".jpg" for path in written)
    for path in written:
        picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert picture.shape[1] == 12 * (FRAME_SIDE + GAP) - GAP
        red = np.abs(picture - rgb(OBJECTS[0])).sum(-1) < 60
        assert red.sum() > 50, "the first structure is outlined"


def test_the_same_seed_draws_the_same_clips_and_overrides_and_seeds_change_them(shards: Path, tmp_path: Path):
    def content(name: str, *more: object) -> list[bytes]:
        result = run(shards, "--out", tmp_path / name, "--clips", 2, *more)
        assert result.exit_code == 0, result.output
        return [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]

    first = content("a", "--seed", 3)
    assert content("b", "seed=3") == first, "as the run's own seed"
    assert content("c", "--seed", 4) != first
    assert content("d", "--seed", 3, "augment=none") != first


def test_modalities_are_chosen_by_the_plans_own_setting(shards: Path, tmp_path: Path):
    run(shards, "--out", tmp_path / "all", "--clips", 1)
    names = sorted(path.stem.removeprefix("clips-") for path in (tmp_path / "all").iterdir())
    result = run(shards, "--out", tmp_path / "one", "--clips", 1, f"data.modalities=[{names[0]}]")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "one").iterdir()] == [f"clips-{names[0]}.jpg"]


def test_modalities_of_stills_and_of_clips_are_both_drawn(shards: Path, tmp_path: Path):
    """Where a run mixes both, a modality that has only one of them is no reason to stop."""
    ordinary = run(shards, "--out", tmp_path / "clips", "--clips", 1)
    mixed = run(shards, "--out", tmp_path / "mixed", "--clips", 4, "data.stills={share:0.5,from_clips:true}")
    single = run(shards, "--out", tmp_path / "single", "--clips", 4, "data.stills={share:1,from_clips:true}")
    assert ordinary.exit_code == mixed.exit_code == single.exit_code == 0, mixed.output + single.output
    for path in (tmp_path / "clips").iterdir():
        assert Image.open(tmp_path / "mixed" / path.name).size[0] > 4 * (FRAME_SIDE + GAP)
        assert Image.open(tmp_path / "single" / path.name).size[0] == 4 * (FRAME_SIDE + GAP) - GAP


def test_an_output_that_is_a_file_is_refused(shards: Path, tmp_path: Path, capfd):
    (tmp_path / "file").write_text("mine")
    result = run(shards, "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot be created" in result.output + capfd.readouterr().err


def test_pictures_that_exist_are_kept_unless_force_is_given(shards: Path, tmp_path: Path, capfd):
    assert run(shards, "--out", tmp_path, "--clips", 1).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run(shards, "--out", tmp_path, "--clips", 1, "--seed", 5)
    assert result.exit_code == 2
    assert "add --force to replace" in result.output + capfd.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run(shards, "--out", tmp_path, "--clips", 1, "--seed", 5, "--force").exit_code == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} != before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("augment.gama.probability=1", "augment.gamma"),
        ("augment=stron", "strong"),
        ("augment.gamma={probability:1,range:[2,1]}", "low end above its high end"),
        ("data.modalities=[XX]", "data.modalities"),
    ],
)
def test_a_wrong_override_is_explained_and_nothing_is_written(
    shards: Path, tmp_path: Path, capfd, override: str, said: str
):
    result = run(shards, "--out", tmp_path / "out", override)
    assert result.exit_code == 2
    assert said in result.output + capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_name_hydra_could_not_read_is_taken_as_it_is(shards: Path, tmp_path: Path):
    strange = tmp_path / "it's {mine}, a=b"
    strange.symlink_to(shards)
    result = run(strange, "--out", tmp_path / "out", "--clips", 1)
    assert result.exit_code == 0, result.output


def test_the_command_is_listed(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "clips" in capsys.readouterr().out


def test_a_structure_has_one_colour_in_all_clips():
    frames, masks = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((2, 1, 64, 64), bool)
    masks[0, 0, 8:24, 8:24] = masks[1, 0, 40:56, 40:56] = True
    one, other = Clip(frames, masks, ("organ", "lesion"), "a"), Clip(frames, masks, ("lesion", "organ"), "b" * 200)
    picture = np.asarray(sheet([one, other], ""))
    for place in (0, FRAME_SIDE + GAP):
        upper = picture[:, place : place + FRAME_SIDE][: FRAME_SIDE // 2 + 20].reshape(-1, 3).tolist()
        assert list(rgb(OBJECTS[0 if place == 0 else 1])) in upper
        assert list(rgb(OBJECTS[1 if place == 0 else 0])) not in upper
