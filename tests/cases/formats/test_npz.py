from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from medsam2.cases import raster
from medsam2.cases.case import CaseError
from medsam2.cases.formats.npz import array_names, read_npz


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_arrays_spacing_and_affine_are_read(tmp_path: Path, write):
    image, mask = read_npz(write.npz(tmp_path / "a.npz"))
    assert (1, *image.array.shape) == mask.planes.shape == (1, 12, 40, 48)
    assert image.spacing == pytest.approx((5.0, 0.7, 0.8))
    assert image.affine[:3, 3] == pytest.approx([10, -20, 30])  # LPS -> RAS


def test_a_file_cut_anywhere_is_refused_and_named(tmp_path: Path, write):
    path = write.npz(tmp_path / "a.npz")
    whole = path.read_bytes()
    for cut in np.linspace(0, len(whole) - 1, 20).astype(int):
        path.write_bytes(whole[:cut])
        with pytest.raises(CaseError, match=r"a\.npz"):
            read_npz(path)


def test_a_flipped_byte_is_found(tmp_path: Path, write):
    path = write.npz(tmp_path / "a.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(CaseError, match="damaged|header"):
        read_npz(path)


def test_a_pickle_never_runs(tmp_path: Path):
    canary = tmp_path / "canary"
    path = tmp_path / "a.npz"
    np.savez(path, imgs=np.array([Canary(canary)], dtype=object), gts=np.zeros(3))
    with pytest.raises(CaseError, match="pickled"):
        read_npz(path)
    assert not canary.exists()


def test_a_bomb_is_stopped_at_the_limit(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(raster, "MAX_UNPACKED_BYTES", 1 << 20)
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, imgs=np.zeros((4, 1000, 1000), np.uint8), gts=np.zeros((4, 1000, 1000), np.uint8))
    assert path.stat().st_size < 50_000
    with pytest.raises(CaseError, match="more than the limit"):
        read_npz(path)


def test_a_header_that_claims_more_than_it_holds_allocates_nothing(tmp_path: Path, write):
    path = write.npz(tmp_path / "a.npz")
    lying = tmp_path / "lying.npz"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(lying, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "imgs.npy":
                content = content.replace(b"(12, 40, 48)", b"(9999999999,").replace(b"9999,", b"99,)")[: len(content)]
            new.writestr(name, content)
    with pytest.raises(CaseError, match=r"claims shape|no valid header"):
        read_npz(lying)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gts": np.zeros((2, 3, 4), np.uint8)}, r"gts of shape \(2, 3, 4\)"),
        ({"gts": np.zeros((12, 40, 48), np.float32)}, "must be integer"),
        ({"spacing": np.array([1.0, 0.0, 1.0])}, "positive"),
        ({"spacing": np.array([1.0, -2.0, 1.0])}, "positive"),
        ({"imgs": np.full((12, 40, 48), np.nan, np.float32)}, "NaN"),
        ({"direction": np.eye(2)}, "direction needs 9"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, write, change: dict, match: str):
    path = write.npz(tmp_path / "a.npz")
    with np.load(path) as content:
        arrays = {name: content[name] for name in content.files} | change
    np.savez(path, **arrays)
    with pytest.raises(CaseError, match=match):
        read_npz(path)


def test_missing_arrays_are_named_with_those_found(tmp_path: Path):
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 3, 4), np.uint8), gts=np.zeros((2, 3, 4), np.uint8))
    with pytest.raises(CaseError, match=r"no array 'imgs' \(found image, gts\)"):
        read_npz(tmp_path / "a.npz")


def test_names_of_a_file_that_is_no_archive_are_none(tmp_path: Path):
    (tmp_path / "a.npz").write_text("not an archive")
    assert array_names(tmp_path / "a.npz") == ()


def test_an_npz_is_a_format_like_others(tmp_path: Path, write):
    from medsam2.cases.formats.registry import read_image, read_mask
    from medsam2.cases.settings import DatasetSettings

    path = write.npz(tmp_path / "CT_a.npz")
    image, mask = read_image(path, DatasetSettings()), read_mask(path, DatasetSettings())
    assert image.array.shape == mask.planes.shape[1:] and image.spacing == (5.0, 0.7, 0.8)
    assert np.allclose(image.affine, mask.affine)
