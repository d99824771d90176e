from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.formats.dicom_multiframe import recognises
from medsam2.cases.formats.registry import read_image
from medsam2.cases.settings import DatasetSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dicom_files import US, header, pixels  # noqa: E402

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
    found = read_image(write(tmp_path / "a.dcm", ybr, "YBR_FULL"), S).array
    assert np.abs(found.astype(int) - rgb).max() <= 3


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
