"""A mask, prepared, and back on the grid of its file: equal to the original in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import write_seg, write_series

from medsam2.cases.case import Orientation
from medsam2.cases.formats.registry import read_image
from medsam2.cases.geometry import to_source
from medsam2.cases.layouts import find_cases, load_case
from medsam2.cases.outputs.volume import write_mask
from medsam2.cases.settings import DatasetSettings
from medsam2.shards.index import read_index
from medsam2.shards.load import load_record, load_segment
from medsam2.shards.prepare.run import PrepareOptions, prepare

MASK = np.zeros((12, 40, 48), np.uint8)
MASK[3:9, 8:24, 10:31] = 1
MASK[5:7, 12:16, 14:20] = 2
MASK[0, 0, 0] = MASK[11, 39, 47] = 2  # corners tell every turn and flip apart
IMAGE = np.random.default_rng(0).normal(0, 90, MASK.shape).astype(np.int16)


def prepared(raw: Path, out: Path, split: str, **options: object) -> tuple[np.ndarray, np.ndarray | None]:
    """Prepare the only case below `raw` into one split, and its planes as one mask on the grid of the source."""
    shares = {"train": 1.0} if split == "train" else {"train": 0.0, "val": 1.0}
    prepare(raw, out, PrepareOptions(shares=shares, **options))  # type: ignore[arg-type]
    index = read_index(out)
    rows = list(range(len(index)))
    masks = [load_segment(index, row)[2][0] for row in rows]
    records = [load_record(index, row) for row in rows]
    first = records[0]
    whole = np.zeros(first.original_shape, masks[0].dtype)
    for record, mask in zip(records, masks, strict=True):
        whole[list(record.frames)] = mask
    affine = None if first.affine is None else np.array(first.affine)
    return to_source(whole, Orientation(first.axes, first.flips), affine)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".nii"])
def test_volumes(tmp_path: Path, write, ending: str, axis: int, split: str):
    spacing = [1.0, 1.1, 1.2]
    spacing[axis] = 5.0
    direction = (0, 1, 0, -1, 0, 0, 0, 0, -1) if ending != ".mha" else (0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, 1)
    place = {"spacing": tuple(spacing), "origin": (3.0, -40.0, 7.5), "direction": direction}
    image = write.volume(tmp_path / "set" / f"imagesTr/a_0000{ending}", IMAGE, **place)
    write.volume(tmp_path / "set" / f"labelsTr/a{ending}", MASK, **place)
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1, "y": 2}, "file_ending": ending}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(description))
    mask, affine = prepared(tmp_path / "set", tmp_path / "out", split)
    assert np.array_equal(mask, MASK)
    original = read_image(image, DatasetSettings()).affine
    assert np.allclose(affine, original, atol=1e-4)


def test_a_written_mask_lies_on_the_grid_of_its_image(tmp_path: Path, write):
    direction = (0, 0, 1, 1, 0, 0, 0, 1, 0)
    (tmp_path / "set").mkdir()
    path = write.volume(tmp_path / "set" / "imagesTr/a_0000.nii.gz", IMAGE, spacing=(4, 1, 1.5), direction=direction)
    write.volume(tmp_path / "set" / "labelsTr/a.nii.gz", MASK, spacing=(4, 1, 1.5), direction=direction)
    description = {"channel_names": {"0": "CT"}, "labels": {"x": 1, "y": 2}, "file_ending": ".nii.gz"}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(description))
    case = load_case(find_cases(tmp_path / "set")[0])
    assert case.orientation.turned
    out = tmp_path / "back.nii.gz"
    write_mask(out, case.planes[0], case.orientation, case.affine, case.spacing)
    a, b = sitk.ReadImage(str(path)), sitk.ReadImage(str(out))
    assert np.array_equal(sitk.GetArrayFromImage(b), MASK)
    for actual, expected in (
        (b.GetSpacing(), a.GetSpacing()),
        (b.GetDirection(), a.GetDirection()),
        (b.GetOrigin(), a.GetOrigin()),
    ):
        assert np.allclose(actual, expected, atol=1e-5)


def _npz(folder: Path, write) -> None:
    folder.mkdir()
    image = np.clip(IMAGE, 0, 255).astype(np.uint8)
    np.savez_compressed(folder / "CT_a.npz", imgs=image, gts=MASK, spacing=np.array([1.0, 1, 5]))


def _davis(folder: Path, write) -> None:
    from PIL import Image

    (folder / "JPEGImages" / "a").mkdir(parents=True)
    for t, frame in enumerate(MASK):
        Image.fromarray(frame * 60).save(folder / "JPEGImages" / "a" / f"{t:05d}.jpg")
        write.palette(folder / "Annotations" / "a" / f"{t:05d}.png", frame)


def _video(folder: Path, write) -> None:
    write.mp4(folder / "videos" / "a.mp4", np.repeat(MASK[..., None] * 60, 3, axis=3))
    for t, frame in enumerate(MASK):
        write.palette(folder / "masks" / "a" / f"{t:05d}.png", frame)


def _tiff(folder: Path, write) -> None:
    from PIL import Image

    for name, stack in (("images", np.abs(IMAGE).astype(np.uint8)), ("masks", MASK)):
        (folder / name).mkdir(parents=True)
        pages = [Image.fromarray(page) for page in stack]
        pages[0].save(folder / name / "a.tif", save_all=True, append_images=pages[1:])


def _dicom(folder: Path, write) -> None:
    files = write_series(folder / "scan", (IMAGE + 2000).astype(np.uint16), orientation=(0, 1, 0, 0, 0, -1))
    write_seg(folder / "seg" / "a.dcm", files, {"x": MASK == 1, "y": MASK == 2})


def _series_in_time(folder: Path, write) -> None:
    for name, array in (("images", IMAGE), ("masks", MASK)):
        (folder / name).mkdir(parents=True)
        frames = sitk.JoinSeries([sitk.GetImageFromArray(frame[None]) for frame in array])
        sitk.WriteImage(frames, str(folder / name / "a.nii.gz"))


def _frames_of_objects(folder: Path, write) -> None:
    from PIL import Image

    for t in range(MASK.shape[0]):
        for path, array in (
            (folder / "JPEGImages" / "a" / f"{t:05d}.jpg", MASK[t] * 60),
            *((folder / "Annotations" / "a" / f"{v}" / f"{t:05d}.png", (MASK[t] == v) * np.uint8(255)) for v in (1, 2)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("build", [_npz, _davis, _video, _tiff, _dicom, _series_in_time, _frames_of_objects])
def test_everything_else(tmp_path: Path, write, build: Callable[..., None], split: str):
    build(tmp_path / "set", write)
    mask, _ = prepared(tmp_path / "set", tmp_path / "out", split, modality="OTHER")
    assert np.array_equal(mask, MASK)
