from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_seg, write_series

from medsam2.cases.case import CaseError, Label
from medsam2.cases.formats.registry import read_image, read_mask
from medsam2.cases.geometry import align_mask
from medsam2.cases.settings import DatasetSettings

S = DatasetSettings()


def test_overlapping_segments_get_planes_of_their_own_and_others_share_one(tmp_path: Path):
    slices = write_series(tmp_path / "s", np.zeros((4, 10, 12), np.uint16))
    a, b, c = (np.zeros((4, 10, 12), bool) for _ in range(3))
    a[1:3, 2:6, 2:6], b[1:3, 4:8, 4:8], c[3, 0:2, 0:2] = True, True, True
    mask = read_mask(write_seg(tmp_path / "m.dcm", slices, {"organ": a, "lesion": b, "vessel": c}), S)
    assert {label.name: label.plane for label in mask.labels} == {"organ": 0, "lesion": 1, "vessel": 0}
    planes, _ = align_mask(mask, read_image(tmp_path / "s", S))  # slices without any segment are not stored
    for label, expected in zip(mask.labels, (a, b, c), strict=True):
        assert np.array_equal(planes[label.plane] == label.id, expected)


def test_a_cut_segmentation_is_named(tmp_path: Path):
    slices = write_series(tmp_path / "s", np.zeros((4, 10, 12), np.uint16))
    path = write_seg(tmp_path / "m.dcm", slices, {"organ": np.ones((4, 10, 12), bool)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CaseError, match=r"m\.dcm"):
        read_mask(path, S)


def test_a_segmentation_is_no_image(tmp_path: Path):
    slices = write_series(tmp_path / "s", np.zeros((2, 10, 12), np.uint16))
    path = write_seg(tmp_path / "m.dcm", slices, {"organ": np.ones((2, 10, 12), bool)})
    with pytest.raises(CaseError, match="is a mask"):
        read_image(path, S)


def test_a_real_segmentation_equals_its_twin_in_nrrd_once_both_lie_in_the_world(test_data: Path):
    folder = test_data / "ct" / "dicom_seg" / "dcmqi"
    mask, twin = read_mask(folder / "liver.dcm", S), read_image(folder / "liver_seg.nrrd", S)
    assert mask.labels == (Label(1, "Liver"),)
    planes, _ = align_mask(mask, twin)
    assert np.array_equal(planes[0] != 0, twin.array != 0)


def test_frames_with_unknown_slices_between_them_are_refused(tmp_path: Path):
    import pydicom

    slices = write_series(tmp_path / "s", np.zeros((12, 10, 12), np.uint16))
    mask = np.zeros((12, 10, 12), bool)
    mask[[2, 10], 2:5, 2:5] = True
    path = write_seg(tmp_path / "m.dcm", slices, {"organ": mask})
    dataset = pydicom.dcmread(path)
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    if "SpacingBetweenSlices" in measures:
        del measures.SpacingBetweenSlices
    dataset.save_as(path)
    with pytest.raises(CaseError, match="SpacingBetweenSlices"):
        read_mask(path, S)


def test_a_real_segmentation_of_overlapping_segments_keeps_every_voxel(test_data: Path):
    import highdicom

    path = test_data / "ct" / "dicom_seg" / "dcmqi" / "partial_overlaps.dcm"
    mask = read_mask(path, S)
    seg = highdicom.seg.segread(path)
    assert [label.name for label in mask.labels] == ["GREEN", "ORANGE", "PURPLE", "LIGHT_BLUE", "DARK_BLUE"]
    frames = seg.pixel_array
    of = [f.SegmentIdentificationSequence[0].ReferencedSegmentNumber for f in seg.PerFrameFunctionalGroupsSequence]
    for segment, label in enumerate(mask.labels, start=1):
        stored = sum(int(frame.sum()) for frame, number in zip(frames, of, strict=True) if number == segment)
        assert int((mask.planes[label.plane] == label.id).sum()) == stored > 0, label.name


def test_fractions_need_a_threshold_and_then_give_a_mask(tmp_path: Path):
    slices = write_series(tmp_path / "s", np.zeros((4, 10, 12), np.uint16))
    chance = np.zeros((4, 10, 12), np.float32)
    chance[:, 2:6, 2:6], chance[:, 3:5, 3:5] = 0.25, 1.0
    mask = read_mask(write_seg(tmp_path / "m.dcm", slices, {"organ": chance}, kind="FRACTIONAL"), S)
    assert mask.planes.dtype == np.float32 and mask.labels == (Label(1, "organ"),)
    assert np.array_equal(mask.planes[0] > 0.5, chance > 0.5)
    assert np.array_equal(mask.planes[0] > 0.1, chance > 0.1)


def test_a_segmentation_of_an_oblique_series_lies_on_it(tmp_path: Path):
    slices = write_series(tmp_path / "s", np.zeros((4, 10, 12), np.uint16), orientation=(1, 0, 0, 0, 0.8, -0.6))
    organ = np.zeros((4, 10, 12), bool)
    organ[0:3, 2:6, 3:9] = True
    mask = read_mask(write_seg(tmp_path / "m.dcm", slices, {"organ": organ}), S)
    planes, _ = align_mask(mask, read_image(tmp_path / "s", S))
    assert np.array_equal(planes[0] == 1, organ)
