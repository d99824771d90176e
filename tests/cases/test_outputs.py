"""Written masks are read back unchanged by an independent reader, on the grid of their source."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import header, pixels, write_enhanced, write_series

from medsam2.cases.case import Label, Orientation
from medsam2.cases.formats import dicom_seg as seg_format
from medsam2.cases.formats import dicom_series, frames, video
from medsam2.cases.formats.volume import read_grid
from medsam2.cases.geometry import align_mask, orientation_of, reorient_affine
from medsam2.cases.outputs import Masks, check_free, find_output, output_for, outputs, write_masks
from medsam2.cases.outputs.mp4 import overlay
from medsam2.cases.raster import Raster
from medsam2.cases.settings import DatasetSettings
from medsam2.errors import UserError

OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
SAGITTAL = (0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
FLIPPED = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def truth(shape: tuple[int, int, int] = (7, 20, 24)) -> np.ndarray:
    """A label map [Z, Y, X] without any symmetry; slice 3 is empty between labelled ones."""
    labels = np.zeros(shape, np.uint8)
    labels[1:3, 2:9, 5:8] = 1
    labels[4, 10:17, 3:20] = 1
    labels[4:6, 3:5, 11:19] = 2
    return labels


def masks_of(
    labels: np.ndarray, raster: Raster, axis: str = "auto", values: tuple[int, ...] = (1, 2), **more: Any
) -> Masks:
    """Masks as prediction passes them: `labels` on the grid of the file, turned, frame by frame."""
    turn = orientation_of(raster.affine, axis) if raster.affine is not None else Orientation()
    turned = turn.apply(labels)
    z, y, x = (raster.spacing[a] for a in turn.axes)
    return Masks(
        names=tuple(f"part {value}" for value in values),
        values=values,
        shape=turned.shape,  # type: ignore[arg-type]
        labels=lambda frame: turned[frame],
        picture=lambda frame: np.full(turned.shape[1:], 90, np.uint8),
        spacing=(z, y, x),
        moving=raster.moving,
        orientation=turn,
        affine=None if raster.affine is None else reorient_affine(raster.affine, labels.shape, turn),  # type: ignore[arg-type]
        sources=more.pop("sources", (raster.path,)),
        where=str(raster.path),
        **more,
    )


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("direction", [OBLIQUE, SAGITTAL, FLIPPED])
def test_a_volume_comes_back_on_the_very_grid_of_its_source(
    tmp_path: Path, write: Any, ending: str, direction: tuple[float, ...]
) -> None:
    image = np.arange(7 * 20 * 24, dtype=np.int16).reshape(7, 20, 24)
    source = write.volume(tmp_path / f"scan{ending}", image, (0.7, 1.3, 4.0), (3.0, -50.0, 12.5), direction)
    grid = read_grid(source)
    masks = masks_of(truth(), Raster(grid.array, grid.spacing, source, grid.affine), axis="y")
    output, is_file = output_for(tmp_path / f"out{ending}", ".nii")
    assert is_file and masks.orientation.turned
    write_masks(output, tmp_path / f"out{ending}", masks)
    result = read_grid(tmp_path / f"out{ending}")
    assert result.array.dtype == np.uint8
    np.testing.assert_array_equal(result.array, truth())
    np.testing.assert_allclose(result.affine, grid.affine, atol=1e-4)


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (0.8, 0.6, 0, -0.6, 0.8, 0)])
def test_a_dicom_seg_comes_back_and_refers_to_the_slices_that_it_marks(
    tmp_path: Path, orientation: tuple[float, ...]
) -> None:
    import highdicom

    paths = write_series(tmp_path / "series", np.full((7, 20, 24), 7, np.int16), orientation=orientation)
    raster = dicom_series.read(tmp_path / "series", DatasetSettings())
    masks = masks_of(truth(), raster, sources=tuple(reversed(paths)), values=(1, 2))
    output, _ = output_for(tmp_path / "out", "dicom_series")
    assert output.name == "dicom-seg"
    write_masks(output, tmp_path / "out.dcm", masks)

    mask = seg_format.read_mask(tmp_path / "out.dcm", DatasetSettings())
    planes, _ = align_mask(mask, raster)
    np.testing.assert_array_equal(planes[0], truth())
    assert [label.name for label in mask.labels] == ["part 1", "part 2"]

    seg = highdicom.seg.segread(tmp_path / "out.dcm")
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == "1.2.3.987654.1" and len(series.ReferencedInstanceSequence) == 7
    uid = {dicom_series.read_header(p, ["SOPInstanceUID"]).SOPInstanceUID: z for z, p in enumerate(paths)}
    marked = {uid[seg.get_source_image_uids()[n][2]] for n in range(7)}
    assert marked == set(range(7))
    for group in seg.PerFrameFunctionalGroupsSequence:
        source = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        assert (truth()[uid[source]] == number).any()


def test_a_dicom_seg_numbers_its_segments_whatever_the_values_in_the_label_map(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "series", np.full((7, 20, 24), 7, np.int16))
    raster = dicom_series.read(tmp_path / "series", DatasetSettings())
    labels = np.array([0, 40, 7], np.uint8)[truth()]
    write_masks(
        find_output("dicom-seg"), tmp_path / "o.dcm", masks_of(labels, raster, values=(40, 7), sources=tuple(paths))
    )
    mask = seg_format.read_mask(tmp_path / "o.dcm", DatasetSettings())
    assert mask.labels == (Label(1, "part 40"), Label(2, "part 7"))


def test_a_dicom_seg_of_a_volume_in_one_file_lies_on_it(tmp_path: Path) -> None:
    from medsam2.cases.formats import dicom_multiframe

    path = write_enhanced(tmp_path / "ct.dcm", np.full((7, 20, 24), 1000, np.uint16))
    raster = dicom_multiframe.read(path, DatasetSettings())
    write_masks(find_output("dicom-seg"), tmp_path / "seg.dcm", masks_of(truth(), raster))
    planes, _ = align_mask(seg_format.read_mask(tmp_path / "seg.dcm", DatasetSettings()), raster)
    np.testing.assert_array_equal(planes[0], truth())


@pytest.mark.parametrize("text", ["ISO_IR 100", ""])
def test_names_of_objects_and_patients_keep_their_letters_whatever_the_source_is_written_in(
    tmp_path: Path, text: str
) -> None:
    import pydicom

    tags = {"SpecificCharacterSet": text, "PatientName": "Müller^Änne" if text else "Mueller^Anne"}
    paths = write_series(tmp_path / "series", np.full((7, 20, 24), 7, np.int16), **tags)
    raster = dicom_series.read(tmp_path / "series", DatasetSettings())
    masks = replace(masks_of(truth(), raster, sources=tuple(paths)), names=("Läsion", "肝臓"))
    write_masks(find_output("dicom-seg"), tmp_path / "o.dcm", masks)
    names = [label.name for label in seg_format.read_mask(tmp_path / "o.dcm", DatasetSettings()).labels]
    assert names == ["Läsion", "肝臓"]
    assert str(pydicom.dcmread(tmp_path / "o.dcm").PatientName) == tags["PatientName"]


def test_a_dicom_seg_without_a_voxel_is_still_one(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "series", np.full((3, 20, 24), 7, np.int16))
    raster = dicom_series.read(tmp_path / "series", DatasetSettings())
    empty = np.zeros((3, 20, 24), np.uint8)
    write_masks(find_output("dicom-seg"), tmp_path / "o.dcm", masks_of(empty, raster, sources=tuple(paths)))
    assert not seg_format.read_mask(tmp_path / "o.dcm", DatasetSettings()).planes.any()


def test_text_of_a_dicom_header_is_in_no_error(tmp_path: Path) -> None:
    import pydicom

    paths = write_series(tmp_path / "series", np.full((3, 20, 24), 7, np.int16))
    for path in paths:
        dataset = pydicom.dcmread(path)
        del dataset.StudyInstanceUID
        dataset.save_as(path)
    raster = dicom_series.read(tmp_path / "series", DatasetSettings())
    masks = masks_of(truth()[:3], raster, sources=tuple(paths))
    with pytest.raises(UserError, match="--format nifti") as caught:
        write_masks(find_output("dicom-seg"), tmp_path / "o.dcm", masks)
    assert "CANARY" not in str(caught.value) and not (tmp_path / "o.dcm").exists()


@pytest.mark.parametrize("kind", ["clip", "nifti"])
def test_a_dicom_seg_of_what_has_no_place_in_a_patient_is_refused(tmp_path: Path, write: Any, kind: str) -> None:
    path = tmp_path / "clip.dcm"
    if kind == "clip":
        clip = np.zeros((7, 20, 24), np.uint8)
        pixels(header("1", "1.2.840.10008.5.1.4.1.1.3.1", "US"), clip).save_as(path, enforce_file_format=True)
    else:
        path = write.volume(tmp_path / "ct.nii.gz", truth())
    masks = masks_of(truth(), Raster(truth(), (0.1, 1.0, 1.0), path, moving=kind == "clip"))
    with pytest.raises(UserError, match="clip.dcm|ct.nii.gz"):
        write_masks(find_output("dicom-seg"), tmp_path / "seg.dcm", masks)


def test_mask_frames_keep_label_values_and_the_names_of_their_pictures(tmp_path: Path) -> None:
    stems = tuple(f"shot_{number}" for number in (2, 10, 11, 30, 31, 32, 33))
    masks = masks_of(truth(), Raster(truth(), (1.0, 1.0, 1.0), tmp_path, moving=True), stems=stems)
    write_masks(find_output("frames"), tmp_path / "masks", masks)
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {f"{stem}.png" for stem in stems}
    np.testing.assert_array_equal(frames.read_mask(tmp_path / "masks", DatasetSettings()).planes[0], truth())


def test_mask_frames_of_a_turned_volume_are_slices_of_its_file(tmp_path: Path, write: Any) -> None:
    source = write.volume(tmp_path / "scan.nrrd", truth(), (0.7, 1.3, 4.0), direction=SAGITTAL)
    grid = read_grid(source)
    masks = masks_of(truth(), Raster(grid.array, grid.spacing, source, grid.affine), axis="y")
    write_masks(find_output("frames"), tmp_path / "masks", masks)
    np.testing.assert_array_equal(frames.read_mask(tmp_path / "masks", DatasetSettings()).planes[0], truth())


def test_values_beyond_a_byte_are_kept_in_every_format_that_computes(tmp_path: Path) -> None:
    labels = truth().astype(np.uint16) * 300
    masks = masks_of(labels, Raster(labels, (1.0, 1.0, 1.0), tmp_path / "clip", moving=True), values=(300, 600))
    write_masks(find_output("frames"), tmp_path / "masks", masks)
    write_masks(find_output("nrrd"), tmp_path / "mask.nrrd", masks)
    np.testing.assert_array_equal(frames.read_mask(tmp_path / "masks", DatasetSettings()).planes[0], labels)
    np.testing.assert_array_equal(read_grid(tmp_path / "mask.nrrd").array, labels)


def test_an_overlay_video_has_every_frame_at_the_rate_of_its_source_also_with_odd_sides(tmp_path: Path) -> None:
    labels = np.zeros((9, 33, 47), np.uint8)
    labels[4:, 8:24, 8:40] = 1
    masks = masks_of(labels, Raster(labels, (0.04, 1.0, 1.0), tmp_path / "clip.mp4", moving=True), values=(1,))
    write_masks(find_output("mp4"), tmp_path / "o.mp4", masks)
    result, rate = video.read_video(tmp_path / "o.mp4")
    assert result.shape == (9, 34, 48, 3) and rate == pytest.approx(25)
    colour = np.abs(result.astype(int) - 90).max(-1)
    assert colour[:4].max() < 12, "no object, no colour"
    assert (colour[4:, 11:21, 12:36] > 20).all()


def test_an_overlay_leaves_the_picture_alone_where_no_object_is() -> None:
    picture = np.arange(20 * 24, dtype=np.uint8).reshape(20, 24)
    labels = truth()[4]
    blended = overlay(picture, labels, {1: np.array([255.0, 0, 0]), 2: np.array([0, 0, 255.0])})
    for channel in range(3):
        np.testing.assert_array_equal(blended[..., channel][labels == 0], picture[labels == 0])
    assert (blended[10, 3:20] == (255, 0, 0)).all(), "the rim in full colour"
    assert (blended[13, 10, 0] > picture[13, 10]) and blended[13, 10, 1] > 0, "tinted inside"


def fails_half_way(path: Path, masks: Masks) -> None:
    (path / "0.png" if path.is_dir() else path).write_bytes(b"half")
    raise UserError("the disk is full")


@pytest.mark.parametrize("name", ["nifti", "frames"])
def test_what_fails_half_way_leaves_the_old_masks_and_nothing_beside_them(tmp_path: Path, name: str) -> None:
    output = find_output(name)
    masks = masks_of(truth(), Raster(truth(), (1.0, 1.0, 1.0), tmp_path, moving=True))
    place = tmp_path / ("masks" + (output.endings[0] if output.endings else ""))
    write_masks(output, place, masks)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="disk is full"):
        write_masks(replace(output, write=fails_half_way), place, masks, force=True)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_force_replaces_all_frames_of_a_longer_clip(tmp_path: Path) -> None:
    output = find_output("frames")
    long = masks_of(truth(), Raster(truth(), (1.0, 1.0, 1.0), tmp_path, moving=True))
    short = masks_of(truth()[:2], Raster(truth()[:2], (1.0, 1.0, 1.0), tmp_path, moving=True))
    write_masks(output, tmp_path / "masks", long)
    with pytest.raises(UserError, match="--force"):
        write_masks(output, tmp_path / "masks", short)
    write_masks(output, tmp_path / "masks", short, force=True)
    assert len(list((tmp_path / "masks").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]


def test_old_frames_come_back_where_the_new_ones_cannot_take_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    output, replace_ = find_output("frames"), os.replace
    masks = masks_of(truth(), Raster(truth(), (1.0, 1.0, 1.0), tmp_path, moving=True))
    write_masks(output, tmp_path / "masks", masks)

    def fails(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError("the network folder is gone")
        replace_(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="is gone"):
        write_masks(output, tmp_path / "masks", masks, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["masks"] and len(list((tmp_path / "masks").iterdir())) == 7


def test_a_folder_with_anything_but_mask_frames_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"photo")
    with pytest.raises(UserError, match=r"holds me\.jpg"):
        check_free(tmp_path / "photos", find_output("frames"), force=True)
    with pytest.raises(UserError, match="a folder, but one file"):
        check_free(tmp_path / "photos", find_output("nifti"), force=True)
    (tmp_path / "text").write_text("")
    with pytest.raises(UserError, match="a file, but a folder"):
        check_free(tmp_path / "text", find_output("frames"), force=True)
    with pytest.raises(UserError, match="text is a file"):
        check_free(tmp_path / "text" / "o.nii", find_output("nifti"), force=False)


def test_names_choose_the_format_and_inputs_the_default() -> None:
    fmt: Callable[[str, str], tuple[str, bool]] = lambda out, source: (  # noqa: E731
        output_for(Path(out), source)[0].name,
        output_for(Path(out), source)[1],
    )
    assert fmt("a.NII.GZ", "video") == ("nifti", True) and fmt("a.dcm", ".nrrd") == ("dicom-seg", True)
    assert fmt("folder", ".nrrd") == ("nrrd", False) and fmt("folder", "dicom_series") == ("dicom-seg", False)
    assert fmt("folder", "video") == ("frames", False) and fmt("m.png", "picture") == ("png", True)
    assert fmt("folder", "never heard of") == ("nifti", False)
    endings = [e for entry in outputs().values() for e in entry.endings]
    assert len(endings) == len(set(endings)), "two formats claim one ending"
    defaults = list(itertools.chain.from_iterable(entry.default_for for entry in outputs().values()))
    assert len(defaults) == len(set(defaults)), "two formats are the default of one input"


def test_an_unknown_format_gets_the_closest_name() -> None:
    with pytest.raises(UserError, match="Did you mean 'dicom-seg'"):
        find_output("dicomseg")
