"""Broken files beside sound ones: each is reported with file, finding and remedy, and never stops the others."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medsam2.shards.index import read_index
from medsam2.shards.load import load_segment
from medsam2.shards.prepare.run import PrepareOptions, prepare

Break = Callable[[Path, Path, type], None]


def cut(image: Path, mask: Path, write: type) -> None:
    image.write_bytes(image.read_bytes()[:-700])


def cut_mask(image: Path, mask: Path, write: type) -> None:
    mask.write_bytes(mask.read_bytes()[:60])


def empty_file(image: Path, mask: Path, write: type) -> None:
    image.write_bytes(b"")


def flipped_bit(image: Path, mask: Path, write: type) -> None:
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 0x10
    image.write_bytes(content)


def all_zero(image: Path, mask: Path, write: type) -> None:
    write.volume(image, np.zeros((12, 40, 48), np.int16))


def no_label(image: Path, mask: Path, write: type) -> None:
    write.volume(mask, np.zeros((12, 40, 48), np.uint8))


def other_shape(image: Path, mask: Path, write: type) -> None:
    for path, array in ((image, write.scan(0)[0]), (mask, write.scan(0)[1][:-1])):
        write.volume(path, array)
        _patch(path, 252, struct.pack("<hh", 0, 0))  # without qform and sform nothing says how they lie


def far_away(image: Path, mask: Path, write: type) -> None:
    write.volume(mask, write.scan(0)[1], origin=(9000.0, 0, 0))


def not_finite(image: Path, mask: Path, write: type) -> None:
    array = write.scan(0)[0].astype(np.float32)
    array[3, 4, 5:7] = np.nan
    write.volume(image, array)


def zero_spacing(image: Path, mask: Path, write: type) -> None:
    _patch(image, 80, struct.pack("<3f", 0.0, 0.0, 0.0), clear_forms=True)


def bomb(image: Path, mask: Path, write: type) -> None:
    with gzip.open(image) as file:
        header = bytearray(file.read(352))
    struct.pack_into("<8h", header, 40, 3, 30000, 30000, 30000, 1, 1, 1, 1)
    image.write_bytes(gzip.compress(bytes(header) + bytes(1 << 20)))


def text(image: Path, mask: Path, write: type) -> None:
    image.write_text("this is no scan\n" * 100)


def unknown_label(image: Path, mask: Path, write: type) -> None:
    write.volume(mask, write.scan(0)[1].astype(np.uint16) * 400)


def fractions(image: Path, mask: Path, write: type) -> None:
    write.volume(mask, write.scan(0)[1].astype(np.float32) * 0.4)


def gone(image: Path, mask: Path, write: type) -> None:
    mask.unlink()


def a_folder(image: Path, mask: Path, write: type) -> None:
    image.unlink()
    image.mkdir()


def _patch(path: Path, at: int, value: bytes, clear_forms: bool = False) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[at : at + len(value)] = value
    if clear_forms:
        content[252:256] = b"\0\0\0\0"
    path.write_bytes(gzip.compress(bytes(content)))


# what breaks the case, which of its files is named, and what the message says
BROKEN: dict[Break, tuple[str, str]] = {
    cut: ("image", "cut short"),
    cut_mask: ("mask", "no NIfTI header in its 60 bytes"),
    empty_file: ("image", "0 bytes"),
    flipped_bit: ("image", "damaged"),
    all_zero: ("image", "empty"),
    no_label: ("image", "no labelled structure"),
    other_shape: ("mask", "no affine"),
    far_away: ("mask", "does not overlap"),
    not_finite: ("image", "2 voxels are NaN or infinite"),
    zero_spacing: ("image", "spacing"),
    bomb: ("image", "limit"),
    text: ("image", "no NIfTI header"),
    unknown_label: ("mask", "the mask holds [400, 800]"),
    fractions: ("mask", "--threshold"),
    gone: ("mask", "no such file"),
    a_folder: ("image", "no such file"),
}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_broken_case_is_reported_and_the_others_are_prepared(
    tmp_path: Path, write, workers: int, monkeypatch: pytest.MonkeyPatch
):
    source = write.nnunet(tmp_path / "raw", cases=3 + len(BROKEN))
    for number, breaks in enumerate(BROKEN, start=3):
        name = f"smith_{number:03d}"
        breaks(source / "imagesTr" / f"{name}_0000.nii.gz", source / "labelsTr" / f"{name}.nii.gz", write)
    result = prepare(source, tmp_path / "out", PrepareOptions(workers=workers))
    listed = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    reasons = {entry["case"]: entry["reason"] for entry in listed}
    assert set(reasons) == {f"smith_{number:03d}" for number in range(3, 3 + len(BROKEN))}
    for number, (breaks, (which, words)) in enumerate(BROKEN.items(), start=3):
        reason = reasons[f"smith_{number:03d}"]
        named = f"smith_{number:03d}_0000.nii.gz" if which == "image" else f"smith_{number:03d}.nii.gz"
        assert named in reason, (breaks.__name__, reason)
        assert words in reason, (breaks.__name__, reason)
        assert "unexpected; please report" not in reason, (breaks.__name__, reason)
    assert result.summary["failed_cases"] == len(BROKEN)
    index = read_index(tmp_path / "out")
    assert len({index.row(i).case for i in range(len(index))}) == 3
    for row in range(len(index)):
        load_segment(index, row)
    assert not [p for p in (tmp_path / "out").rglob("*") if "partial" in p.name or p.name == ".staging"]


def test_labels_above_255_are_kept(tmp_path: Path, write):
    source = write.nnunet(tmp_path / "raw", cases=2)
    description = json.loads((source / "dataset.json").read_text())
    description["labels"] = {"background": 0, "organ": 400, "lesion": 65535}
    (source / "dataset.json").write_text(json.dumps(description))
    for number in range(2):
        mask = write.scan(number)[1].astype(np.uint16)
        values = np.array([0, 400, 65535], np.uint16)[mask]
        write.volume(source / "labelsTr" / f"smith_{number:03d}.nii.gz", values)
    prepare(source, tmp_path / "out", PrepareOptions())
    index = read_index(tmp_path / "out")
    assert {(o.name, o.value) for o in index.row(0).objects} == {("organ", 400), ("lesion", 65535)}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user to lose the permission")
def test_a_file_without_read_permission_is_reported(write):
    folder = Path(tempfile.mkdtemp())
    try:
        source = write.nnunet(folder / "raw", cases=2)
        locked = source / "imagesTr" / "smith_001_0000.nii.gz"
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o777)
        locked.chmod(0o000)
        os.seteuid(65534)
        try:
            result = prepare(source, folder / "out", PrepareOptions())
        finally:
            os.seteuid(0)
        assert [r.job.ref.case_id for r in result.failures] == ["smith_001"]
        assert f"{locked}: no permission to read it" in result.failures[0].error
    finally:
        shutil.rmtree(folder)
