from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

import medsam2.shards.load as load_module
from medsam2.cases.case import Case
from medsam2.errors import UserError
from medsam2.shards.index import IndexRow, read_index
from medsam2.shards.index_tars import index_tars
from medsam2.shards.inspect.survey import inspect_shards
from medsam2.shards.load import load_segment
from medsam2.shards.prepare.pseudonyms import read_salt, salted_hash
from medsam2.shards.prepare.remove import remove_patients

NOTE = {
    "dataset": "echo",
    "split": "train",
    "patient": "Smith",
    "modality": "US",
    "labels": {"1": "liver", "2": "cyst"},
}


def picture(seed: int, size: tuple[int, ...] = (20, 24, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, size, np.uint8)


def labels(seed: int = 0, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[3:9, 4 : 10 + seed % 5] = 1
    mask[12:17, 6:20] = 2
    return mask


def encoded(array: np.ndarray, kind: str = "PNG", palette: bool = False) -> bytes:
    image, buffer = Image.fromarray(array), io.BytesIO()
    if palette:
        image.putpalette([(n * 37) % 256 for n in range(768)])
    image.save(buffer, kind)
    return buffer.getvalue()


JPEG, MASK = encoded(picture(0), "JPEG"), encoded(labels())


def write(path: Path, samples: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as sink:
        for sample in samples:
            sink.write(sample)
    return path


def still(key: str = "s", **note: Any) -> dict[str, Any]:
    return {"__key__": key, "jpg": JPEG, "mask.png": MASK, "json": {**NOTE, **note}}


def index(folder: Path | str, **options: Any) -> dict[str, Any]:
    return index_tars(str(folder), workers=2, **options)


def load(folder: Path, key: str) -> tuple[IndexRow, np.ndarray, np.ndarray]:
    segments = read_index(folder)
    return load_segment(segments, next(n for n in range(len(segments)) if segments.row(n).key == key))


def test_stills_of_a_tar_writer_come_back_as_they_were_written(tmp_path: Path):
    path = write(tmp_path / "a.tar", [still("one", spacing=[1, 0.3, 0.4]), still("two", patient="Jones")])
    before = path.read_bytes()
    summary = index(tmp_path)
    assert path.read_bytes() == before
    assert summary["counts"] == {"patients": 2, "cases": 2, "segments": 2, "objects": 4, "frames": 2}
    row, image, planes = load(tmp_path, "one")
    assert np.array_equal(image[0], np.asarray(Image.open(io.BytesIO(JPEG))))
    assert np.array_equal(planes[0, 0], labels())
    assert (row.dataset, row.split, row.modality, row.kind) == ("echo", "train", "US", "still")
    assert (row.codec, row.mask_codec, row.spacing) == ("jpeg", "png", [1.0, 0.3, 0.4])
    assert row.patient == salted_hash(read_salt(), "patient", "echo", "Smith")
    assert [(o.name, o.pixels, o.boxes) for o in row.objects] == [
        ("liver", [36], [4, 3, 10, 9]),
        ("cyst", [70], [6, 12, 20, 17]),
    ]
    for name in ("index.arrow", "index.json"):
        assert b"Smith" not in (tmp_path / name).read_bytes()


def test_frames_are_a_clip_with_the_content_hash_of_the_same_pictures(tmp_path: Path):
    frames = np.stack([picture(n, (20, 24)) for n in range(3)])
    masks = np.stack([labels(n).astype(np.uint16) for n in range(3)])
    masks[masks == 2] = 700
    sample: dict[str, Any] = {"__key__": "clip", "json": {**NOTE, "modality": "CT", "labels": {"1": "a", "700": "b"}}}
    for n in range(3):
        sample |= {f"{n:04d}.png": encoded(frames[n]), f"{n:04d}.mask.png": encoded(masks[n])}
    write(tmp_path / "a.tar", [sample])
    index(tmp_path)
    row, image, planes = load(tmp_path, "clip")
    assert (row.kind, row.frames, row.mask_dtype) == ("volume", [0, 1, 2], "uint16")
    assert np.array_equal(image, frames)
    assert np.array_equal(planes[0], masks)
    case = Case(frames, masks[None], (), (1.0, 1.0, 1.0), "CT", "volume", "a", "x", "x")
    assert row.content_hash == case.content_hash


def test_inspection_and_the_way_back_to_the_source_work_without_records(tmp_path: Path):
    write(tmp_path / "a.tar", [still("one"), {**still("two"), "mask.png": encoded(labels(), palette=True)}])
    index(tmp_path)
    segments = read_index(tmp_path)
    report = inspect_shards(segments)
    assert report.problems == []
    assert [report.overview.rows[0][place] for place in (2, 4)] == ["train", 2]
    assert np.array_equal(load_segment(segments, 1)[2][0, 0], labels())


def test_our_own_tars_get_the_index_that_was_lost(shards: Path, tmp_path: Path):
    for path in shards.glob("*.tar"):
        shutil.copy(path, tmp_path)
    index(tmp_path)
    before, after = (sorted(read_index(f).table.to_pylist(), key=lambda r: r["key"]) for f in (shards, tmp_path))
    assert before == after
    lost, made = (json.loads((f / "index.json").read_text()) for f in (shards, tmp_path))
    for key in ("cases", "counts", "groups", "structures", "shards", "duplicates"):
        assert made[key] == lost[key], key


def test_what_only_the_old_index_knows_is_kept(shards: Path, tmp_path: Path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    summary = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**summary, "mine": 1}))
    with pytest.raises(UserError, match="--force"):
        index(folder)
    made = index(folder, force=True)
    assert made["configuration"] == summary["configuration"]
    assert made["datasets"] == summary["datasets"]
    assert made["mine"] == 1


def test_an_own_segment_without_a_frame_is_refused_by_the_name_of_the_member(shards: Path, tmp_path: Path):
    source = next(shards.glob("scope-train*.tar"))
    with tarfile.open(source) as old, tarfile.open(tmp_path / source.name, "w") as new:
        infos = old.getmembers()
        lost = f"{infos[0].name.removesuffix('.json')}.0002.mask.zst"
        for info in infos:
            if info.name != lost:
                new.addfile(info, old.extractfile(info))
    with pytest.raises(UserError, match=rf"{lost}: is missing"):
        index(tmp_path)


def test_indexed_tars_give_training_clips_with_their_own_pixels(tmp_path: Path):
    from medsam2.data.plan.plan import Plan
    from medsam2.data.read.catalog import Catalog
    from medsam2.data.read.reader import StepDataset
    from medsam2.data.settings import DataSettings

    clip: dict[str, Any] = {"__key__": "clip", "json": NOTE}
    for t in range(6):
        clip |= {f"{t:04d}.png": encoded(picture(t)), f"{t:04d}.mask.png": encoded(labels(t))}
    write(tmp_path / "a.tar", [clip])
    index(tmp_path)
    settings = DataSettings(shards=(str(tmp_path),), clip_frames=4, max_objects=2, min_pixels=1, temperature=0)
    plan = Plan([Catalog(tmp_path)], settings, seed=3, global_batch=1)
    batch, entry = StepDataset(plan)[0], plan.batch(0)[0]
    row, image, planes = load(tmp_path, "clip")
    assert batch.damaged_keys == ()
    assert np.array_equal(batch.frames[0].numpy(), image[list(entry.frames)].transpose(0, 3, 1, 2))
    values = [row.objects[which].value for which in entry.objects]
    for mask, value in zip(batch.masks.numpy(), values, strict=False):
        assert np.array_equal(mask, planes[0, list(entry.frames)] == value)


def test_tars_behind_a_url_get_their_index_there(tmp_path: Path):
    import fsspec

    memory = fsspec.filesystem("memory")
    path = write(tmp_path / "a.tar", [still()])
    memory.pipe_file("/foreign/tars/a.tar", path.read_bytes())
    try:
        index("memory://foreign/tars")
        for name in ("index.arrow", "index.json"):
            (tmp_path / name).write_bytes(memory.cat_file(f"/foreign/tars/{name}"))
    finally:
        memory.rm("/foreign", recursive=True)
    assert load(tmp_path, "s")[0].dataset == "echo"


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = {"jpg": JPEG, "mask.png": MASK, "json": NOTE}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({"jpg": JPEG, "json": NOTE}, r"k\.mask\.png: is missing"),
    "no image": ({"mask.png": MASK, "json": NOTE}, r"k\.jpg: is missing"),
    "no json": ({"jpg": JPEG, "mask.png": MASK}, r"k\.json: is missing"),
    "other name of the mask": ({"jpg": JPEG, "seg.png": MASK, "json": NOTE}, r"k\.mask\.png: is missing"),
    "two images": ({**GOOD, "png": MASK}, r"k\.(jpg|png): expected k\.0000\."),
    "a gap": ({"0000.jpg": JPEG, "0002.jpg": JPEG, "0000.mask.png": MASK, "json": NOTE}, r"k\.0002\.jpg: expected"),
    "mask of no frame": ({**GOOD, "0003.mask.png": MASK}, r"k\.0003\.mask\.png: expected"),
    "colour mask": ({**GOOD, "mask.png": encoded(picture(0))}, r"k\.mask\.png: .*a palette or grey image"),
    "mask of another size": ({**GOOD, "mask.png": encoded(labels(0, (24, 20)))}, r"k\.mask\.png: .*24 x 20"),
    "bomb": ({"png": bomb(60000), "mask.png": MASK, "json": NOTE}, r"k\.png: is not an 8-bit png.*decompression bomb"),
    "cut picture": ({**GOOD, "jpg": JPEG[:-80]}, r"k\.jpg: jpeg frame is truncated"),
    "text": ({**GOOD, "jpg": b"hello"}, r"k\.jpg: is not an 8-bit jpeg"),
    "unknown label": ({**GOOD, "json": {**NOTE, "labels": {"1": "a"}}}, r"k\.json: labels: lacks the value 2"),
    "odd label": ({**GOOD, "json": {**NOTE, "labels": {"liver": "x"}}}, r"k\.json: labels\.liver"),
    "odd spacing": ({**GOOD, "json": {**NOTE, "spacing": [0, 1, 1]}}, r"k\.json: spacing\.0: .*greater than 0"),
    "no modality": ({**GOOD, "json": {**NOTE, "modality": "MRI"}}, r"k\.json: modality: .*'CT', 'MR'"),
    "broken json": ({**GOOD, "json": b"{"}, r"k\.json: is not valid json"),
    "json that is a list": ({**GOOD, "json": b"[]"}, r"k\.json: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tar_that_does_not_follow_the_convention_is_refused_by_member(tmp_path: Path, case: str):
    members, message = REFUSED[case]
    write(tmp_path / "a.tar", [still("good"), {"__key__": "k", **members}])
    with pytest.raises(UserError, match=rf"a\.tar: {message}"):
        index(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_patient_in_two_splits_and_a_key_in_two_tars_are_refused(tmp_path: Path):
    write(tmp_path / "a.tar", [still("one")])
    write(tmp_path / "b.tar", [still("two", split="val")])
    with pytest.raises(UserError, match=r"b\.tar: two: its patient is in val here, but in train in a\.tar: one"):
        index(tmp_path)
    write(tmp_path / "b.tar", [still("one")])
    with pytest.raises(UserError, match=r"b\.tar: one: is in a\.tar too"):
        index(tmp_path)


def test_a_patient_goes_although_two_datasets_use_the_same_keys(tmp_path: Path):
    for dataset in "ab":
        samples = [still(key, dataset=dataset, patient=patient) for key, patient in (("one", "anna"), ("two", "bob"))]
        write(tmp_path / f"{dataset}.tar", samples)
    index(tmp_path)
    remove_patients(tmp_path, ["anna"])
    rows = read_index(tmp_path).table.to_pylist()
    assert sorted((row["dataset"], row["key"]) for row in rows) == [("a", "two"), ("b", "two")]
    assert len({row["shard"] for row in rows}) == 2


def test_what_lies_between_the_members_of_a_sample_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    between = {"__key__": "s", "k.bin": bytes(4 << 20)}  # as other tools leave the original beside the picture
    note, picture_of = {"__key__": "s", "json": NOTE, "jpg": JPEG}, {"__key__": "s", "mask.png": MASK}
    write(tmp_path / "a.tar", [{**note, **between, **picture_of}])
    index(tmp_path)
    reads: list[int] = []
    whole = load_module._read
    monkeypatch.setattr(
        load_module, "_read", lambda i, e, offset, length: (reads.append(length), whole(i, e, offset, length))[1]
    )
    _, image, _ = load(tmp_path, "s")
    assert image.shape == (1, 20, 24, 3) and sum(reads) == len(JPEG) + len(MASK)


def test_a_damaged_description_is_made_again(tmp_path: Path):
    write(tmp_path / "a.tar", [still("one")])
    index(tmp_path)
    (tmp_path / "index.json").write_bytes(b"{ cut")
    index(tmp_path, force=True)
    assert json.loads((tmp_path / "index.json").read_text())["shards"].keys() == {"a.tar"}


def test_samples_without_a_labelled_structure_are_left_out_and_counted(tmp_path: Path):
    empty = {**still("empty"), "mask.png": encoded(np.zeros((20, 24), np.uint8))}
    write(tmp_path / "a.tar", [still("one"), empty])
    assert index(tmp_path)["failed_cases"] == 1
    assert read_index(tmp_path).table["key"].to_pylist() == ["one"]
    write(tmp_path / "a.tar", [empty])
    with pytest.raises(UserError, match="no sample of 1 tars has a labelled structure"):
        index(tmp_path, force=True)


def test_damaged_tars_are_refused_with_the_byte(tmp_path: Path):
    path = write(tmp_path / "a.tar", [still("one"), still("two")])
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        second = next(info for info in tar if info.name.startswith("two"))
    damaged = bytearray(content)
    damaged[second.offset : second.offset + 100] = b"\xff" * 100
    end = len(content.rstrip(b"\0")) + -len(content.rstrip(b"\0")) % 512
    oversized = tarfile.TarInfo("x.jpg")
    oversized.size = 1 << 40
    for bad, at in (
        (content[: second.offset_data + 10], second.offset),
        (bytes(damaged), second.offset),
        (content[:end], end),
        (content[:end] + oversized.tobuf(tarfile.GNU_FORMAT) + bytes(1024), end),
        (b"", 0),
        (zlib.compress(content), 0),
    ):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=rf"a\.tar: is not a complete, uncompressed tar after byte {at} "):
            index(tmp_path)


def test_a_folder_without_tars_says_what_is_wrong(tmp_path: Path):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no \.tar file.*unpacked"):
        index(tmp_path)
