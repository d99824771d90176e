from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medsam2.cases.assemble import assemble
from medsam2.cases.case import CaseError, CaseRef
from medsam2.cases.formats.registry import read_image, read_mask
from medsam2.cases.formats.volume import count_time_slices, read_time_slice
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.raster import MaskRaster
from medsam2.cases.settings import DatasetSettings


@dataclass(frozen=True, eq=False)
class Volume:
    image: np.ndarray
    masks: tuple[np.ndarray, ...]
    spacing: tuple[float, float, float]
    affine: np.ndarray | None


def read_volume(image: Path, masks: tuple[Path, ...] = (), settings: DatasetSettings | None = None) -> Volume:
    """Read an image and its masks as a layout does; without masks, voxels above zero are the mask."""
    settings = settings or DatasetSettings()
    ref = CaseRef("set", "case", "patient", "test", (image,), masks, modality="CT", settings=settings)
    scan = read_image(image, settings)
    rasters = [read_mask(path, settings) for path in masks]
    case = assemble(ref, scan, rasters or [MaskRaster((scan.array > 0).astype(np.uint8)[None], image, scan.affine)])
    return Volume(case.image, tuple(case.planes), case.spacing, case.affine)


def test_image_and_mask_on_one_grid_are_read_without_a_report(tmp_path: Path, write):
    image, mask = write.scan(1)
    a, b = write.volume(tmp_path / "a.nii.gz", image), write.volume(tmp_path / "b.nii.gz", mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaseWarning)
        volume = read_volume(a, (b,))
    assert np.array_equal(volume.image, image)
    assert np.array_equal(volume.masks[0], mask)
    assert volume.spacing == pytest.approx((4.0, 1.0, 1.0))


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_formats_agree(tmp_path: Path, write, ending: str):
    image, mask = write.scan(2)
    volume = read_volume(write.volume(tmp_path / f"a{ending}", image), (write.volume(tmp_path / f"b{ending}", mask),))
    assert np.array_equal(volume.image, image)
    assert np.array_equal(volume.masks[0], mask)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_cut_nrrd_and_mha_are_refused(tmp_path: Path, write, ending: str):
    path = write.volume(tmp_path / f"a{ending}", write.scan(0)[0])
    whole = path.read_bytes()
    for cut in np.linspace(10, len(whole) - 50, 8).astype(int):
        path.write_bytes(whole[:cut])
        with pytest.raises(CaseError, match=path.name):
            read_volume(path)


def test_a_mask_stored_upside_down_is_brought_onto_the_image_grid_and_reported(tmp_path: Path, write):
    image, mask = write.scan(3)
    a = write.volume(tmp_path / "a.nii.gz", image)
    flipped = mask[:, ::-1]
    last = mask.shape[1] - 1
    b = write.volume(tmp_path / "b.nii.gz", flipped, origin=(0, last, 0), direction=(1, 0, 0, 0, -1, 0, 0, 0, 1))
    with pytest.warns(CaseWarning, match=r"b\.nii\.gz: mask resampled to the image's grid"):
        volume = read_volume(a, (b,))
    assert np.array_equal(volume.masks[0], mask)


def test_a_coarser_mask_with_an_affine_is_resampled(tmp_path: Path, write):
    image, mask = write.scan(4)
    a = write.volume(tmp_path / "a.nii.gz", image)
    coarse = mask[:, ::2, ::2]
    b = write.volume(tmp_path / "b.nii.gz", coarse, spacing=(2.0, 2.0, 4.0), origin=(0.5, 0.5, 0.0))
    with pytest.warns(CaseWarning, match="resampled"):
        moved = read_volume(a, (b,)).masks[0]
    assert np.array_equal(moved, np.repeat(np.repeat(coarse, 2, axis=1), 2, axis=2))


def test_rounding_of_an_affine_is_not_a_difference(tmp_path: Path, write):
    image, mask = write.scan(5)
    a = write.volume(tmp_path / "a.nii.gz", image)
    b = write.volume(tmp_path / "b.nii.gz", mask, spacing=(1.0004, 1.0, 4.0), origin=(0.01, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaseWarning)
        assert np.array_equal(read_volume(a, (b,)).masks[0], mask)


def test_masks_that_lie_elsewhere_are_refused_naming_both_files(tmp_path: Path, write):
    image, mask = write.scan(6)
    a = write.volume(tmp_path / "a.nii.gz", image)
    b = write.volume(tmp_path / "b.nii.gz", mask, origin=(5000, 0, 0))
    with pytest.raises(CaseError, match=r"b\.nii\.gz.*does not overlap.*a\.nii\.gz"):
        read_volume(a, (b,))


def test_unequal_shapes_without_an_affine_are_refused_naming_both_shapes(tmp_path: Path, write):
    image, mask = write.scan(7)
    paths = [write.volume(tmp_path / "a.nii", image), write.volume(tmp_path / "b.nii", mask[:-1])]
    for path in paths:
        content = bytearray(path.read_bytes())
        content[252:256] = b"\0\0\0\0"  # qform_code and sform_code
        path.write_bytes(content)
    with pytest.raises(CaseError, match=r"\(11, 40, 48\).*\(12, 40, 48\).*no affine"):
        read_volume(paths[0], (paths[1],))


def test_equal_shapes_without_an_affine_are_taken_together_and_reported(tmp_path: Path, write):
    image, mask = write.scan(8)
    paths = [write.volume(tmp_path / "a.nii", image, origin=(7, 0, 0)), write.volume(tmp_path / "b.nii", mask)]
    content = bytearray(paths[1].read_bytes())
    content[252:256] = b"\0\0\0\0"
    paths[1].write_bytes(content)
    with pytest.warns(CaseWarning, match="no affine"):
        volume = read_volume(paths[0], (paths[1],))
    assert volume.masks[0].sum() == mask.sum()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_run_along_the_coarsest_axis_and_the_affine_leads_back(tmp_path: Path, write, axis: int):
    rng = np.random.default_rng(axis)
    mask = rng.integers(0, 3, (8, 10, 12), dtype=np.uint8)
    spacing = [1.0, 1.1, 1.2]
    spacing[2 - axis] = 5.0
    path = write.volume(tmp_path / "m.nii.gz", mask, spacing=tuple(spacing), origin=(3.0, -4.0, 5.0))
    volume = read_volume(path, (path,))
    assert volume.spacing[0] == pytest.approx(5.0)
    assert volume.image.shape[0] == mask.shape[axis]
    # voxel by voxel: array index -> world through our affine -> index of the original file
    original = sitk.ReadImage(str(path))
    for index in np.ndindex(3, 3, 3):
        z, y, x = index
        world = volume.affine @ np.array([x, y, z, 1.0])
        there = original.TransformPhysicalPointToIndex((-world[0], -world[1], world[2]))
        assert original[there] == volume.masks[0][z, y, x]


def test_an_oblique_scan_keeps_its_affine(tmp_path: Path, write):
    c, s = np.cos(0.3), np.sin(0.3)
    image, mask = write.scan(9)
    direction = (1, 0, 0, 0, c, -s, 0, s, c)
    path = write.volume(tmp_path / "a.nii.gz", image, direction=direction)
    volume = read_volume(path, (write.volume(tmp_path / "b.nii.gz", mask, direction=direction),))
    assert np.array_equal(volume.masks[0], mask)
    assert np.linalg.norm(volume.affine[:3, 2]) == pytest.approx(4.0, abs=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_refused(tmp_path: Path, write, value: float):
    image = write.scan(0)[0].astype(np.float32)
    image[2, 3, 4] = value
    with pytest.raises(CaseError, match=r"a\.nii\.gz: 1 voxels are NaN or infinite"):
        read_volume(write.volume(tmp_path / "a.nii.gz", image))


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (np.full((12, 40, 48), 0.5, np.float32), "fractions"),
        (np.full((12, 40, 48), -1, np.int16), "between 0 and 65535"),
        (np.full((12, 40, 48), 70000, np.int32), "between 0 and 65535"),
        (np.full((12, 40, 48), np.nan, np.float32), "between 0 and 65535"),
    ],
)
def test_masks_that_are_no_labels_are_refused(tmp_path: Path, write, mask: np.ndarray, match: str):
    a, b = write.volume(tmp_path / "a.nii.gz", write.scan(0)[0]), write.volume(tmp_path / "b.nii.gz", mask)
    with pytest.raises(CaseError, match=match):
        read_volume(a, (b,))


def test_labels_above_255_and_whole_floats_are_read(tmp_path: Path, write):
    image, mask = write.scan(0)
    a = write.volume(tmp_path / "a.nii.gz", image)
    wide = mask.astype(np.uint16) * 400
    assert np.array_equal(read_volume(a, (write.volume(tmp_path / "w.nii.gz", wide),)).masks[0], wide)
    floats = write.volume(tmp_path / "f.nii.gz", mask.astype(np.float64))
    assert np.array_equal(read_volume(a, (floats,)).masks[0], mask)


def test_missing_and_unreadable_files_are_named(tmp_path: Path):
    with pytest.raises(CaseError, match=r"gone\.nii\.gz: no such file"):
        read_volume(tmp_path / "gone.nii.gz")
    (tmp_path / "empty.nii.gz").touch()
    with pytest.raises(CaseError, match="0 bytes"):
        read_volume(tmp_path / "empty.nii.gz")


def test_the_real_segmentation_of_another_grid_aligns_with_its_scan(test_data: Path):
    folder = test_data / "ct" / "totalsegmentator"
    with pytest.warns(CaseWarning, match="resampled"):
        volume = read_volume(folder / "example_ct.nii.gz", (folder / "example_seg.nii.gz",))
    covered = volume.masks[0].any(axis=(1, 2))
    assert covered.sum() == 30
    assert covered[:30].all() or covered[-30:].all()


def four_d(path: Path, array: np.ndarray) -> Path:
    """Write [T, Z, Y, X] as a 4-D file."""
    series = [sitk.GetImageFromArray(volume) for volume in array]
    for volume in series:
        volume.SetSpacing((1.5, 1.25, 8.0))
    joined = sitk.JoinSeries(series, 0.0, 0.04)
    sitk.WriteImage(joined, str(path), True)
    return path


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_a_series_in_time_gives_one_clip_a_slice(tmp_path: Path, ending: str):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 900, (6, 3, 8, 9)).astype(np.int16)
    mask = rng.integers(0, 3, (6, 3, 8, 9), dtype=np.uint8)
    a, b = four_d(tmp_path / f"a{ending}", image), four_d(tmp_path / f"b{ending}", mask)
    assert count_time_slices(a) == 3
    clip = read_time_slice(a, 2)
    assert clip.moving and clip.spacing == pytest.approx((0.04, 1.25, 1.5))
    assert np.array_equal(clip.array, image[:, 2])
    assert np.array_equal(read_time_slice(b, 2).array, mask[:, 2])
    with pytest.raises(CaseError, match="4-D"):
        read_image(a, DatasetSettings())


def test_a_volume_has_no_slices_in_time(tmp_path: Path, write):
    assert count_time_slices(write.volume(tmp_path / "a.nii.gz", write.scan(0)[0])) == 0


def test_a_probability_map_is_thresholded_only_when_asked(tmp_path: Path, write):
    image, mask = write.scan(0)
    rng = np.random.default_rng(0)
    chance = np.clip(mask.astype(np.float32) * 0.6 + rng.uniform(0, 0.3, mask.shape).astype(np.float32), 0, 1)
    a, b = write.volume(tmp_path / "a.nii.gz", image), write.volume(tmp_path / "p.nii.gz", chance)
    with pytest.raises(CaseError, match=r"p\.nii\.gz: .* --threshold 0\.5"):
        read_volume(a, (b,))
    assert np.array_equal(read_volume(a, (b,), DatasetSettings(threshold=0.5)).masks[0], chance > 0.5)
    labels = write.volume(tmp_path / "l.nii.gz", mask)
    assert np.array_equal(read_volume(a, (labels,), DatasetSettings(threshold=127)).masks[0], mask)


def test_declared_values_for_voxels_that_are_not_finite_are_used_and_reported(tmp_path: Path, write):
    image, mask = write.scan(0)
    image = image.astype(np.float32)
    image[2, 3, 4] = np.nan
    a, b = write.volume(tmp_path / "a.nii.gz", image), write.volume(tmp_path / "b.nii.gz", mask)
    with pytest.warns(CaseWarning, match="1 NaN or infinite voxels became -1000"):
        volume = read_volume(a, (b,), DatasetSettings(nonfinite=-1000))
    assert volume.image[2, 3, 4] == -1000


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_the_slicing_axis_can_be_chosen(tmp_path: Path, write, axis: str):
    image, mask = write.scan(0)
    a, b = write.volume(tmp_path / "a.nii.gz", image), write.volume(tmp_path / "b.nii.gz", mask)
    volume = read_volume(a, (b,), DatasetSettings(axis=axis))  # type: ignore[arg-type]
    assert volume.image.shape[0] == {"x": 48, "y": 40, "z": 12}[axis]
    assert volume.masks[0].sum() == mask.sum()


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii"])
@pytest.mark.parametrize("value", ["0", "-1.5"])
def test_zero_and_negative_spacing_is_refused(tmp_path: Path, write, ending: str, value: str):
    path = write.volume(tmp_path / f"a{ending}", write.scan(0)[0], spacing=(2.5, 2.5, 2.5))
    content = path.read_bytes()
    if ending == ".nrrd":
        if value == "0":
            content = content.replace(b"(2.5,0,0)", b"(0,0,0)")
        else:
            content = content.replace(b"space directions: (", b"spacings: -1 1 1\nspace directions: (")
    elif ending == ".mha":
        content = content.replace(b"ElementSpacing = 2.5", f"ElementSpacing = {value}".encode())
    else:
        changed = bytearray(content)
        struct.pack_into("<f", changed, 80, float(value))
        changed[252:256] = bytes(4)
        content = bytes(changed)
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(CaseError, match=path.name):
        read_volume(path)
