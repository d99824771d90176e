from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import US, header, pixels

from medsam2.cases.case import CaseError
from medsam2.cases.formats.dicom_multiframe import recognises
from medsam2.cases.formats.registry import read_image
from medsam2.cases.settings import DatasetSettings

S = DatasetSettings()
PACKAGED = Path(pydicom.__file__).parent / "data" / "test_files"


def write(path: Path, array: np.ndarray, kind: str, **tags: object) -> Path:
    dataset = pixels(header("1", US, "US"), array, kind)
    for key, value in tags.items():
        setattr(dataset, key, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_grey_frames_are_a_clip_with_its_frame_time(tmp_path: Path):
    array = np.random.default_rng(0).integers(0, 255, (5, 8, 10), dtype=np.uint8)
    raster = read_image(write(tmp_path / "a.dcm", array, "MONOCHROME2", FrameTime=40), S)
    assert raster.moving and raster.spacing[0] == pytest.approx(0.04)
    assert np.array_equal(raster.array, array)


def test_colour_frames_keep_their_colours_and_grey_ones_lose_the_channels(tmp_path: Path):
    array = np.random.default_rng(0).integers(0, 255, (4, 8, 10, 3), dtype=np.uint8)
    assert np.array_equal(read_image(write(tmp_path / "a.dcm", array, "RGB"), S).array, array)
    grey = np.repeat(array[..., :1], 3, axis=3)
    assert np.array_equal(read_image(write(tmp_path / "b.dcm", grey, "RGB"), S).array, grey[..., 0])


def test_uncompressed_ybr_becomes_rgb(tmp_path: Path):
    from pydicom.pixels import convert_color_space

    rgb = np.random.default_rng(0).integers(40, 200, (3, 8, 10, 3), dtype=np.uint8)
    ybr = convert_color_space(rgb, "RGB", "YBR_FULL")
    frames = read_image(write(tmp_path / "a.dcm", ybr, "YBR_FULL"), S).array
    assert np.abs(frames.astype(int) - rgb).max() <= 3


def test_a_cut_file_is_refused_with_the_bytes_it_should_have(tmp_path: Path):
    path = write(tmp_path / "a.dcm", np.zeros((4, 8, 10), np.uint8), "MONOCHROME2")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CaseError, match=r"a\.dcm"):
        read_image(path, S)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("examples_ybr_color.dcm", (30, 240, 320, 3)), ("examples_palette.dcm", (1, 350, 800, 3))],
)
def test_real_colour_files_are_read(name: str, shape: tuple[int, ...]):
    if not (PACKAGED / name).is_file():
        pytest.skip(f"this release of pydicom carries no {name}")
    assert recognises(PACKAGED / name)
    raster = read_image(PACKAGED / name, S)
    assert raster.array.shape == shape and raster.array.dtype == np.uint8
    if name.startswith("examples_ybr"):  # an ultrasound clip of 30 frames with a calibrated region
        assert raster.spacing == pytest.approx((0.0333, 0.5105, 0.5105), abs=1e-3)


GREY = np.random.default_rng(1).integers(0, 255, (3, 8, 10), dtype=np.uint8)


@pytest.mark.parametrize(
    ("tags", "seconds"),
    [({"FrameTime": 40}, 0.04), ({"FrameTimeVector": [0, 20, 20]}, 0.02), ({"CineRate": 50}, 0.02),
     ({"RecommendedDisplayFrameRate": 25}, 0.04), ({}, 1.0)],
)  # fmt: skip
def test_the_time_between_frames_comes_from_whatever_tag_says_it(tmp_path: Path, tags: dict, seconds: float):
    assert read_image(write(tmp_path / "a.dcm", GREY, "MONOCHROME2", **tags), S).spacing[0] == pytest.approx(seconds)


def test_a_calibrated_region_in_cm_gives_mm_and_one_in_seconds_gives_none(tmp_path: Path):
    from pydicom.dataset import Dataset

    region = Dataset()
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.02, -0.03
    raster = read_image(write(tmp_path / "a.dcm", GREY, "MONOCHROME2", SequenceOfUltrasoundRegions=[region]), S)
    assert raster.spacing[1:] == pytest.approx((0.3, 0.2))
    region.PhysicalUnitsXDirection = 4
    raster = read_image(write(tmp_path / "b.dcm", GREY, "MONOCHROME2", SequenceOfUltrasoundRegions=[region]), S)
    assert raster.spacing[1:] == (1.0, 1.0)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_gives_its_colours(tmp_path: Path, bits: int):
    table = np.random.default_rng(2).integers(0, 256, (3, 256))
    tags: dict[str, object] = {}
    for name, row in zip(("Red", "Green", "Blue"), table, strict=True):
        stored = (row * 257).astype("<u2") if bits == 16 else row.astype(np.uint8)
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        tags[f"{name}PaletteColorLookupTableData"] = stored.tobytes()
    frames = read_image(write(tmp_path / "a.dcm", GREY, "PALETTE COLOR", **tags), S).array
    assert np.array_equal(frames, table.T[GREY].astype(np.uint8))


def test_half_sampled_ybr_becomes_rgb(tmp_path: Path):
    # two pixels share their colour: Y1 Y2 Cb Cr
    packed = np.tile(np.array([76, 150, 128, 128], np.uint8), (2, 4, 2))  # [T, Y, bytes of a row of 4 pixels]
    path = write(tmp_path / "a.dcm", np.zeros((2, 4, 4, 3), np.uint8), "YBR_FULL_422", PixelData=packed.tobytes())
    frames = read_image(path, S).array
    assert frames.shape == (2, 4, 4)  # no colour: grey
    assert np.abs(frames.astype(int) - np.tile([76, 150], 2)).max() <= 1


def test_an_enhanced_ct_is_a_volume_in_the_world(tmp_path: Path):
    from dicom_files import write_enhanced

    stored = np.random.default_rng(3).integers(0, 3000, (4, 8, 10)).astype(np.uint16)
    raster = read_image(write_enhanced(tmp_path / "a.dcm", stored), S)
    assert not raster.moving and raster.spacing == pytest.approx((4.0, 1.5, 1.25))
    for z in range(4):  # the order of slices is free as long as the affine tells it
        index = np.linalg.solve(raster.affine, [20, -30, 5 + 4 * z, 1])
        assert np.allclose(index[:2], 0)
        assert np.array_equal(raster.array[round(index[2])], stored[z].astype(int) - 1000)


def test_a_legacy_converted_ct_is_a_volume_of_rescaled_values(tmp_path: Path):
    import highdicom
    from dicom_files import write_series

    stored = np.random.default_rng(3).integers(0, 3000, (4, 8, 10)).astype(np.uint16)
    slices = [pydicom.dcmread(path) for path in write_series(tmp_path / "series", stored)]
    for entry in slices:
        entry.ImageType, entry.AcquisitionNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], 1
    converted = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        legacy_datasets=slices, series_instance_uid=highdicom.UID(), series_number=9,
        sop_instance_uid=highdicom.UID(), instance_number=1,
    )  # fmt: skip
    converted.save_as(tmp_path / "a.dcm")
    raster, series = read_image(tmp_path / "a.dcm", S), read_image(tmp_path / "series", S)
    assert not raster.moving and raster.spacing == pytest.approx((4.0, 1.5, 1.25))
    for z in range(4):
        index = np.linalg.solve(raster.affine, series.affine @ [0, 0, z, 1])
        assert np.array_equal(raster.array[round(index[2])], series.array[z])
