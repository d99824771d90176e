from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import CANARIES, write_series

from medsam2.cases import raster
from medsam2.cases.case import CaseError
from medsam2.cases.formats import dicom_series
from medsam2.cases.formats.dicom_series import read, recognises
from medsam2.cases.formats.registry import read_image
from medsam2.cases.geometry import CaseWarning, affine_from_itk
from medsam2.cases.settings import DatasetSettings

STORED = np.random.default_rng(0).integers(0, 3000, (6, 10, 12)).astype(np.uint16)
S = DatasetSettings()


def with_itk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    place = [np.array(part) for part in (image.GetSpacing(), image.GetDirection(), image.GetOrigin())]
    return sitk.GetArrayFromImage(image), affine_from_itk(*place)


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0.8, -0.6), (0, 1, 0, 0, 0, -1)])
def test_slices_in_any_order_and_orientation_are_read_as_simpleitk_reads_them(tmp_path: Path, orientation):
    write_series(tmp_path / "s", STORED, orientation=orientation)
    raster = read_image(tmp_path / "s", S)
    expected, affine = with_itk(tmp_path / "s")
    assert np.array_equal(raster.array, expected)
    assert raster.array.dtype == np.int16
    assert np.allclose(raster.affine, affine, atol=1e-4)
    assert raster.spacing == pytest.approx((4.0, 1.5, 1.25))
    assert raster.window == (-90, 210)


def test_values_are_rescaled_slice_by_slice(tmp_path: Path):
    write_series(tmp_path / "s", STORED[:3], slope=0.5, intercept=10)
    assert np.allclose(read(tmp_path / "s", S).array, STORED[:3] * 0.5 + 10)


def test_the_inverted_grey_scale_is_turned(tmp_path: Path):
    write_series(tmp_path / "s", STORED[:2], intercept=0, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read(tmp_path / "s", S).array, 65535 - STORED[:2].astype(np.int32))


def test_a_missing_slice_is_reported_with_its_position_and_read_only_when_asked(tmp_path: Path):
    write_series(tmp_path / "s", STORED, skip=(3,))
    with pytest.raises(CaseError, match=r"a slice is missing between slice 2 .* 13\.00 mm\) and slice 3 .* 21\.00 mm"):
        read(tmp_path / "s", S)
    with pytest.warns(CaseWarning, match="missing"):
        raster = read(tmp_path / "s", DatasetSettings(allow_gaps=True))
    assert raster.array.shape == (5, 10, 12)


def test_a_slice_that_is_twice_there_is_named_with_its_twin(tmp_path: Path):
    paths = write_series(tmp_path / "s", STORED)
    (tmp_path / "s" / "copy.dcm").write_bytes(paths[2].read_bytes())
    with pytest.raises(CaseError, match=rf"two slices lie at 13\.00 mm: ({paths[2].name}|copy\.dcm)"):
        read(tmp_path / "s", S)


def test_unequal_slices_are_refused(tmp_path: Path):
    write_series(tmp_path / "s", STORED)
    write_series(tmp_path / "s", STORED[:1], spacing=(4.0, 9.0, 9.0), ImagePositionPatient=[0, 0, 99])
    with pytest.raises(CaseError, match="PixelSpacing"):
        read(tmp_path / "s", S)


def test_two_series_in_one_folder_are_not_mixed(tmp_path: Path):
    write_series(tmp_path / "s", STORED)
    write_series(tmp_path / "s", STORED, uid="2")
    with pytest.raises(CaseError, match="holds 2 image series"):
        read(tmp_path / "s", S)


@pytest.mark.parametrize("cut", [10, 140, 400, 900, -1])
def test_a_cut_slice_is_named_and_no_text_of_it_is_quoted(tmp_path: Path, cut: int):
    paths = write_series(tmp_path / "s", STORED)
    paths[3].write_bytes(paths[3].read_bytes()[:cut])
    with pytest.raises(CaseError) as caught:
        read(tmp_path / "s", S)
    message = str(caught.value)
    assert paths[3].name in message or "missing" in message
    assert not any(canary in message for canary in CANARIES)


def test_other_files_are_not_dicom(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x" * 500)
    (tmp_path / "a" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    assert not recognises(tmp_path / "a")


def test_the_real_series_equals_simpleitk(test_data: Path):
    folder = test_data / "ct" / "totalsegmentator" / "example_ct_dicom"
    raster = read(folder, S)
    expected, affine = with_itk(folder)
    assert np.array_equal(raster.array, expected)
    assert np.allclose(raster.affine, affine)


def moved(paths: list[Path], shift) -> None:
    """Every slice `z` shifted by `shift(z)` mm along the columns, as a tilted gantry does."""
    import pydicom

    for z, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        x, y, height = (float(v) for v in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x, y + shift(z), height]
        dataset.save_as(path)


def test_slices_of_a_tilted_gantry_lie_where_their_headers_say(tmp_path: Path):
    import pydicom

    paths = write_series(tmp_path / "s", STORED)
    moved(paths, lambda z: 1.5 * z)
    affine = read(tmp_path / "s", S).affine
    for z, path in enumerate(paths):
        x, y, height = (float(v) for v in pydicom.dcmread(path).ImagePositionPatient)
        assert np.allclose(affine @ [0, 0, z, 1], [-x, -y, height, 1])
    paths[3].unlink()
    with pytest.warns(CaseWarning, match="missing"):
        gap = read(tmp_path / "s", DatasetSettings(allow_gaps=True)).affine
    assert np.allclose(gap, affine)


def test_a_slice_shifted_in_its_plane_is_refused_with_its_offset(tmp_path: Path):
    moved(write_series(tmp_path / "s", STORED), lambda z: 7 if z == 2 else 0)
    with pytest.raises(CaseError, match=r"slice 2 .* lies 7\.00 mm beside the line"):
        read(tmp_path / "s", S)


def test_a_slope_of_its_own_for_each_slice_is_honoured(tmp_path: Path):
    import pydicom

    for z, path in enumerate(write_series(tmp_path / "s", STORED[:3])):
        dataset = pydicom.dcmread(path)
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5 * (z + 1), 0
        dataset.save_as(path)
    array = read(tmp_path / "s", S).array
    assert array.dtype == np.float32
    assert np.allclose(array, STORED[:3] * (0.5 * np.arange(1, 4))[:, None, None])


def test_missing_pixels_are_counted(tmp_path: Path):
    paths = write_series(tmp_path / "s", STORED)
    paths[3].write_bytes(paths[3].read_bytes()[:-50])
    with pytest.raises(CaseError, match=r"cut short: 190 of 240 bytes"):
        read(tmp_path / "s", S)


def test_compressed_slices_equal_uncompressed_ones(tmp_path: Path):
    import pydicom

    write_series(tmp_path / "s", STORED)
    for path in write_series(tmp_path / "c", STORED):
        dataset = pydicom.dcmread(path)
        dataset.compress(pydicom.uid.JPEGLSLossless)
        dataset.save_as(path)
    assert np.array_equal(read(tmp_path / "c", S).array, read(tmp_path / "s", S).array)


def test_a_file_of_several_frames_is_no_slice(tmp_path: Path):
    from dicom_files import header, pixels

    (tmp_path / "s").mkdir()
    pixels(header("1"), STORED).save_as(tmp_path / "s" / "a.dcm", enforce_file_format=True)
    with pytest.raises(CaseError, match="several frames"):
        read(tmp_path / "s", S)


def test_the_limit_on_unpacked_bytes_holds(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(raster, "MAX_UNPACKED_BYTES", 1000)

    with pytest.raises(CaseError, match="more than the limit"):
        dicom_series.read_files(write_series(tmp_path / "s", STORED), S)
