from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medsam2.cases.case import CaseError
from medsam2.cases.formats.volume import read_grid


def voxels_of(path: Path) -> np.ndarray:
    return read_grid(path).array


@pytest.fixture
def scan(tmp_path: Path, write) -> Path:
    return write.volume(tmp_path / "scan.nii.gz", write.scan(0)[0])


def test_voxels_equal_those_that_simpleitk_reads(scan: Path):
    assert np.array_equal(voxels_of(scan), sitk.GetArrayFromImage(sitk.ReadImage(str(scan))))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
def test_every_plain_type_is_read_as_it_was_written(tmp_path: Path, write, dtype: str):
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    path = write.volume(tmp_path / "a.nii", array)
    read = voxels_of(path)
    assert read.dtype == array.dtype
    assert np.array_equal(read, array)


@pytest.mark.parametrize("name", ["cut.nii.gz", "cut.nii"])
def test_a_file_cut_anywhere_is_refused_and_named(scan: Path, tmp_path: Path, name: str):
    whole = scan.read_bytes() if name.endswith("gz") else gzip.decompress(scan.read_bytes())
    path = tmp_path / name
    for cut in [1, 100, 347, 353, *np.linspace(400, len(whole) - 1, 25).astype(int), len(whole) - 8, len(whole) - 4]:
        path.write_bytes(whole[:cut])
        with pytest.raises(CaseError, match=name):
            voxels_of(path)


def test_the_message_of_a_cut_file_has_bytes_promised_and_found(scan: Path, tmp_path: Path):
    path = tmp_path / "cut.nii"
    path.write_bytes(gzip.decompress(scan.read_bytes())[: 352 + 1000])
    with pytest.raises(CaseError, match=r"promises 46080 bytes .* it holds 1000"):
        voxels_of(path)


def test_a_flipped_byte_is_found_by_the_checksum(scan: Path):
    content = bytearray(scan.read_bytes())
    content[len(content) // 2] ^= 0xFF
    scan.write_bytes(content)
    with pytest.raises(CaseError, match="damaged|cut short"):
        voxels_of(scan)


def test_joined_gzip_members_are_read_as_one(scan: Path):
    raw = gzip.decompress(scan.read_bytes())
    expected = voxels_of(scan)
    scan.write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]))
    assert np.array_equal(voxels_of(scan), expected)


def test_bytes_behind_the_stream_do_no_harm(scan: Path):
    expected = voxels_of(scan)
    scan.write_bytes(scan.read_bytes() + b"trailing")
    assert np.array_equal(voxels_of(scan), expected)


def test_whole_slope_and_intercept_keep_integers(scan: Path):
    raw = bytearray(gzip.decompress(scan.read_bytes()))
    stored = voxels_of(scan)
    struct.pack_into("<2f", raw, 112, 1.0, -1024.0)
    scan.write_bytes(gzip.compress(bytes(raw)))
    read = voxels_of(scan)
    assert read.dtype == np.int32
    assert np.array_equal(read, stored.astype(int) - 1024)
    assert np.array_equal(read, sitk.GetArrayFromImage(sitk.ReadImage(str(scan))))


def test_fractional_slope_gives_floats(scan: Path):
    raw = bytearray(gzip.decompress(scan.read_bytes()))
    stored = voxels_of(scan)
    struct.pack_into("<2f", raw, 112, 0.5, 3.0)
    scan.write_bytes(gzip.compress(bytes(raw)))
    assert np.allclose(voxels_of(scan), stored * 0.5 + 3)


def test_a_bomb_is_stopped_at_the_limit_before_it_is_unpacked(scan: Path):
    raw = bytearray(gzip.decompress(scan.read_bytes()))
    struct.pack_into("<4h", raw, 40, 3, 30000, 30000, 30000)
    scan.write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(CaseError, match=r"GiB, more than the limit of 8\.00 GiB"):
        voxels_of(scan)


def test_what_follows_the_promised_voxels_is_not_kept(scan: Path):
    raw = gzip.decompress(scan.read_bytes())
    expected = voxels_of(scan)
    scan.write_bytes(gzip.compress(raw + b"\0" * (64 << 20)))
    assert np.array_equal(voxels_of(scan), expected)


def test_five_dimensions_are_refused(tmp_path: Path):
    path = tmp_path / "series.nii"
    sitk.WriteImage(sitk.Image([4, 5, 6, 3, 2], sitk.sitkInt16), str(path))
    with pytest.raises(CaseError, match="5-D"):
        voxels_of(path)


def test_a_text_file_is_not_nifti(tmp_path: Path):
    path = tmp_path / "notes.nii"
    path.write_text("hello" * 200)
    with pytest.raises(CaseError, match="no NIfTI header"):
        voxels_of(path)
