"""The files of generated cases are what other programs expect of their format."""

import json

import av
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medsam2.demo.phantoms import generate, write_cases
from medsam2.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "cases"
    steps = []
    summary = write_cases(out, 2, 7, workers=1, progress=lambda done, total: steps.append((done, total)))
    return out, summary, steps


def test_every_case_is_reported_to_the_progress_bar(written):
    _, summary, steps = written
    assert steps == [(done, 8) for done in range(1, 9)]
    assert list(summary) == ["CT", "MR", "US", "ENDOSCOPY"]


@pytest.mark.parametrize(
    ("modality", "folder", "channel"), [("CT", "Dataset001_PhantomCT", "CT"), ("MR", "Dataset002_PhantomMR", "MRI")]
)
def test_volumes_are_nnunet_raw_folders_and_hold_the_generated_voxels(written, modality, folder, channel):
    out, _, _ = written
    described = json.loads((out / folder / "dataset.json").read_text())
    assert described["channel_names"] == {"0": channel}
    assert described["numTraining"] == 2 and described["file_ending"] == ".nii.gz"
    name = f"{modality.lower()}_0001"
    image = sitk.ReadImage(str(out / folder / "imagesTr" / f"{name}_0000.nii.gz"))
    labels = sitk.ReadImage(str(out / folder / "labelsTr" / f"{name}.nii.gz"))
    case = generate(modality, 7, 1)
    assert np.array_equal(sitk.GetArrayFromImage(image), case.image)
    assert np.array_equal(sitk.GetArrayFromImage(labels), case.planes[0])
    assert image.GetSize() == labels.GetSize() and np.allclose(image.GetDirection(), labels.GetDirection())
    assert np.allclose(image.GetSpacing(), case.spacing[::-1], atol=1e-5)
    assert described["labels"] == {"background": 0} | {label.name: label.id for label in case.labels}


def test_the_world_matrix_of_the_case_is_that_of_the_file(written):
    out, _, _ = written
    image = sitk.ReadImage(str(out / "Dataset002_PhantomMR" / "imagesTr" / "mr_0002_0000.nii.gz"))
    lps = np.array(image.TransformIndexToPhysicalPoint((3, 4, 5)))
    ras = generate("MR", 7, 2).affine @ np.array([3, 4, 5, 1.0])
    assert np.allclose(lps * [-1, -1, 1], ras[:3], atol=1e-3)


def test_ultrasound_is_jpeg_frames_with_palette_masks(written):
    out, _, _ = written
    case, root = generate("US", 7, 1), out / "phantom_us"
    meta = json.loads((root / "meta.json").read_text())
    assert meta["modality"] == "US" and meta["labels"] == {label.name: label.id for label in case.labels}
    pictures = sorted((root / "JPEGImages" / "us_0001").iterdir())
    masks = sorted((root / "Annotations" / "us_0001").iterdir())
    assert [p.name for p in pictures] == [f"{frame:05d}.jpg" for frame in range(len(case.image))]
    assert [p.stem for p in masks] == [p.stem for p in pictures]
    mask = Image.open(masks[8])
    assert mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0]
    assert np.array_equal(np.array(mask), case.planes[0, 8])
    assert np.abs(np.array(Image.open(pictures[8])).astype(int) - case.image[8]).mean() < 4


def test_endoscopy_is_a_video_that_shows_the_generated_frames_in_order(written):
    out, _, _ = written
    case, root = generate("ENDOSCOPY", 7, 1), out / "phantom_endoscopy"
    with av.open(str(root / "videos" / "endo_0001.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert float(container.streams.video[0].average_rate) == json.loads((root / "meta.json").read_text())["fps"]
    assert frames.shape == case.image.shape
    assert np.abs(frames.astype(int) - case.image).mean() < 5
    masks = sorted((root / "masks" / "endo_0001").iterdir())
    assert len(masks) == len(frames)
    assert np.array_equal(np.array(Image.open(masks[5])), case.planes[0, 5])


def test_nothing_half_written_is_left(written):
    out, _, _ = written
    assert not [path for path in out.rglob("*") if "partial" in path.name]


def test_two_processes_write_the_same_voxels_as_one(written, tmp_path):
    out, _, _ = written
    write_cases(tmp_path / "again", 2, 7, modalities=("CT",), workers=2)
    for name in ("imagesTr/ct_0002_0000.nii.gz", "labelsTr/ct_0001.nii.gz"):
        ours = sitk.ReadImage(str(out / "Dataset001_PhantomCT" / name))
        theirs = sitk.ReadImage(str(tmp_path / "again" / "Dataset001_PhantomCT" / name))
        assert np.array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs))


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_cases(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_wrong_family_is_found_before_the_folder_is_made(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'vessel'"):
        write_cases(tmp_path / "out", 1, only=("vesel",))
    assert not (tmp_path / "out").exists()


def test_a_modality_without_the_only_family_is_left_out_unless_it_was_asked_for(tmp_path):
    summary = write_cases(tmp_path / "out", 1, only=("instrument",), workers=1)
    assert list(summary) == ["ENDOSCOPY"]
    with pytest.raises(UserError, match="no family for CT"):
        write_cases(tmp_path / "more", 1, only=("instrument",), modalities=("CT",))


def test_less_than_one_case_is_refused(tmp_path):
    with pytest.raises(UserError, match="cases is 0"):
        write_cases(tmp_path / "out", 0)
