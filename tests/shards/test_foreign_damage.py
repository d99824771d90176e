from __future__ import annotations

import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_tars import JPEG, MASK, encoded, index, labels, npy, picture, reasons, rows_of, stills, write

from medsam2.cases.settings import SettingsBook
from medsam2.errors import UserError
from medsam2.shards.foreign import scan_tar
from medsam2.shards.index import read_index


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({"jpg": JPEG}, "no mask"),
    "no image": ({"mask.png": MASK}, "no image"),
    "empty mask": ({"jpg": JPEG, "mask.png": encoded(np.zeros((20, 24), np.uint8), "PNG")}, "no labelled pixel"),
    "colour mask": ({"jpg": JPEG, "mask.png": encoded(picture(0), "PNG")}, "colours are no labels"),
    "other size": ({"jpg": JPEG, "mask.png": encoded(labels(0, (24, 20)), "PNG")}, "another size"),
    "two masks": ({"jpg": JPEG, "mask.png": MASK, "seg.png": MASK}, "only one can be meant"),
    "two images": ({"jpg": JPEG, "png": MASK, "mask.png": MASK}, "only one can be meant"),
    "bomb": ({"png": bomb(60000), "mask.png": MASK}, "decompression bomb"),
    "cut picture": ({"jpg": JPEG[:-80], "mask.png": MASK}, "does not decode"),
    "text": ({"jpg": b"hello", "mask.png": MASK}, "not readable as jpeg"),
    "Fortran": ({"npy": npy(np.asfortranarray(picture(0, (20, 24)))), "mask.png": MASK}, "Fortran order"),
    "big endian": ({"jpg": JPEG, "mask.npy": npy(labels().astype(">u2"))}, "array of >u2"),
    "float": ({"npy": npy(np.ones((20, 24), np.float32)), "mask.png": MASK}, "array of <f4"),
    "short array": ({"npy": npy(picture(0, (20, 24)))[:-1], "mask.png": MASK}, "is cut"),
    "pickle": ({"npy": b"\x80\x04K\x01.", "mask.png": MASK}, "no readable header"),
    "more masks": ({"jpg": JPEG, "mask.npy": npy(np.stack([labels()] * 2))}, "another number of masks"),
    "mask of no frame": ({"0.jpg": JPEG, "3.mask.png": MASK}, "frame that is not there"),
    "odd labels": ({"jpg": JPEG, "mask.png": MASK, "json": {"labels": {"liver": "x"}}}, "neither a whole number"),
    "odd spacing": ({"jpg": JPEG, "mask.png": MASK, "json": {"spacing": [0, 1]}}, "positive numbers"),
    "broken json": ({"jpg": JPEG, "mask.png": MASK, "json": b"{"}, "json is not readable"),
}


def test_bad_samples_are_skipped_with_a_reason_and_the_good_one_stays(tmp_path: Path):
    samples = [{"__key__": key.replace(" ", "_"), **members} for key, (members, _) in BAD.items()]
    write(tmp_path / "a.tar", [*samples, {"__key__": "good", "jpg": JPEG, "mask.png": MASK}])
    result = index(tmp_path)
    assert set(rows_of(tmp_path)) == {"good"}
    found = reasons(result)
    assert set(found) == {key.replace(" ", "_") for key in BAD}
    for key, (_, reason) in BAD.items():
        assert reason in found[key.replace(" ", "_")], key
    with pytest.raises(UserError, match=r"stopped by --strict; nothing was written"):
        index(tmp_path, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_cut_tar_keeps_what_stands_before_the_cut_and_is_named_with_the_byte(tmp_path: Path):
    path = write(tmp_path / "whole.tar", stills(4))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        third = next(info for info in tar if info.name == "000002.jpg")
    path.write_bytes(content[: third.offset_data + 10])
    broken = bytearray(content)
    broken[third.offset : third.offset + 100] = b"\xff" * 100
    (tmp_path / "broken.tar").write_bytes(broken)
    (tmp_path / "nomark.tar").write_bytes(content.rstrip(b"\0") + b"\0" * (-len(content.rstrip(b"\0")) % 512))
    (tmp_path / "empty.tar").write_bytes(b"")
    damaged = dict(index(tmp_path).damaged)
    assert f"the member at byte {third.offset} claims" in damaged["whole.tar"]
    assert damaged["broken.tar"] == f"no valid header at byte {third.offset}"
    assert "without an end mark" in damaged["nomark.tar"]
    assert "empty file" in damaged["empty.tar"]
    shards = read_index(tmp_path).table["shard"].to_pylist()
    assert {name: shards.count(name) for name in set(shards)} == {"whole.tar": 2, "broken.tar": 2, "nomark.tar": 4}


@pytest.mark.parametrize("size", [1 << 40, -512])
def test_a_member_that_claims_more_than_the_file_has_is_not_believed(tmp_path: Path, size: int):
    path = write(tmp_path / "a.tar", stills(1))
    info = tarfile.TarInfo("000009.npy")
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT)
    with open(path, "r+b") as file:
        file.seek(0)
        content = file.read().rstrip(b"\0")
        content += b"\0" * (-len(content) % 512)
        file.seek(0)
        file.truncate()
        file.write(content + header + b"\0" * 1024)
    result = index(tmp_path)
    assert result.samples == 1
    assert f"byte {len(content)}" in result.damaged[0][1]


def test_a_tar_that_is_compressed_under_a_plain_name_is_damaged(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"))
    scan = scan_tar("a.tar", str(tmp_path), SettingsBook(), "US")
    assert "not readable as an uncompressed tar" in scan.damage


def test_an_own_segment_without_a_frame_is_skipped(shards: Path, tmp_path: Path):
    source = next(shards.glob("scope-train*.tar"))
    with tarfile.open(source) as old, tarfile.open(tmp_path / source.name, "w") as new:
        infos = old.getmembers()
        first = infos[0].name.removesuffix(".json")
        for info in infos:
            if info.name != f"{first}.0002.mask.zst":
                new.addfile(info, old.extractfile(info))
    (tmp_path / "other-train-000000.tar").write_bytes(next(shards.glob("Dataset001*train*.tar")).read_bytes())
    result = index(tmp_path, modality="")
    assert reasons(result) == {first: "a segment of medsam2 without its mask of frame 2"}
