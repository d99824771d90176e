from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from foreign_tars import (
    JPEG,
    MASK,
    encoded,
    index,
    labels,
    load,
    npy,
    palette,
    picture,
    reasons,
    rows_of,
    stills,
    write,
)
from PIL import Image

from medsam2.cases.settings import DatasetSettings, SettingsBook
from medsam2.errors import UserError
from medsam2.shards.foreign_sample import names_in
from medsam2.shards.identity import read_salt, salted
from medsam2.shards.index import read_index
from medsam2.shards.inspect import inspect_shards
from medsam2.shards.load import load_record, load_segment
from medsam2.shards.restore import source_mask


def test_pictures_masks_and_json_of_a_shard_writer_come_back_as_they_were_written(tmp_path: Path):
    pattern = str(tmp_path / "echo-train-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as sink:
        for sample in stills(7, spacing=[0.3, 0.4], modality="us"):
            sink.write(sample)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    result = index(tmp_path, modality="")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    assert (result.samples, len(before), result.skipped, result.damaged) == (7, 3, (), ())
    seen = 0
    for sample in webdataset.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False):
        row, image, planes = load(tmp_path, sample["__key__"])
        assert np.array_equal(image[0], np.asarray(Image.open(io.BytesIO(sample["jpg"]))))
        assert np.array_equal(planes[0, 0], np.asarray(Image.open(io.BytesIO(sample["mask.png"]))))
        assert (row.dataset, row.split, row.modality, row.kind) == ("echo", "train", "US", "still")
        assert (row.codec, row.mask_codec, row.spacing) == ("jpeg", "png", [1.0, 0.3, 0.4])
        assert row.patient == salted(read_salt(), "patient", "echo", f"p{seen}")
        assert [o.name for o in row.objects] == ["liver", "tumour"]
        for found in row.objects:
            ys, xs = np.nonzero(planes[0, 0] == found.value)
            assert found.pixels == [len(ys)]
            assert found.boxes == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        seen += 1
    assert seen == 7


@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 3), (5, 20, 24), (5, 20, 24, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_arrays_are_read_as_byte_ranges_of_their_member(tmp_path: Path, shape: tuple[int, ...], kind: type):
    frames = shape[0] if len(shape) == 4 or shape == (5, 20, 24) else 1
    image = picture(0, shape)
    mask = np.stack([labels(n) for n in range(frames)]).astype(kind)
    if kind == np.uint16:
        mask[mask == 2] = 700
    write(tmp_path / "a.tar", [{"__key__": "s", "npy": npy(image), "seg.npy": npy(mask if frames > 1 else mask[0])}])
    index(tmp_path, modality="CT")
    row, loaded, planes = load(tmp_path, "s")
    assert row.codec == row.mask_codec == "raw"
    assert row.kind == ("volume" if frames > 1 else "still")
    assert np.array_equal(loaded, image.reshape(loaded.shape))
    assert np.array_equal(planes[0], mask)
    assert planes.dtype == kind
    assert [o.name for o in row.objects] == ["object_1", "object_2" if kind == np.uint8 else "object_700"]
    assert [o.pixels for o in row.objects] == [(mask == o.value).sum(axis=(1, 2)).tolist() for o in row.objects]


def test_numbered_frames_are_a_clip_and_gaps_in_its_masks_split_it(tmp_path: Path):
    frames = [picture(n, (20, 24)) for n in range(6)]
    sample: dict[str, Any] = {"__key__": "clip"}
    for n, frame in enumerate(frames):
        sample[f"{5 * n:04d}.png"] = encoded(frame, "PNG")
        if n not in (2, 3):
            sample[f"{5 * n:04d}.mask.png"] = palette(labels(n))
    write(tmp_path / "a.tar", [sample])
    index(tmp_path)
    rows = rows_of(tmp_path)
    assert {key: row.frames for key, row in rows.items()} == {"clip-00000": [0, 1], "clip-00004": [4, 5]}
    assert len({row.case for row in rows.values()}) == 1
    for key, row in rows.items():
        _, image, planes = load(tmp_path, key)
        assert row.original_shape == [6, 20, 24]
        assert np.array_equal(image, [frames[n] for n in row.frames])
        assert np.array_equal(planes[0], [labels(n) for n in row.frames])


def test_the_same_pictures_in_another_format_have_the_same_content_hash(tmp_path: Path):
    image = picture(1, (3, 20, 24))
    mask = np.stack([labels(n) for n in range(3)])
    frames = {f"{n}.png": encoded(image[n], "PNG") for n in range(3)}
    samples = [{"__key__": "array", "npy": npy(image), "mask.npy": npy(mask)}]
    samples.append({"__key__": "frames", **frames, "mask.npy": npy(mask)})
    write(tmp_path / "a-train-0.tar", samples[:1])
    write(tmp_path / "a-val-0.tar", samples[1:])
    result = index(tmp_path)
    from medsam2.cases.case import Case

    case = Case(image, mask[None], (), (1.0, 1.0, 1.0), "US", "clip", "a", "x", "x")
    assert {row.content_hash for row in rows_of(tmp_path).values()} == {case.content_hash}
    assert len(result.summary["duplicates_across_splits"]) == 1
    assert "the same pixels stand in different splits" in result.notes[0]


def test_our_own_tars_get_the_index_that_was_lost(shards: Path, tmp_path: Path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        shutil.copy(path, folder)
    result = index(folder, modality="")
    before, after = (sorted(read_index(f).table.to_pylist(), key=lambda r: r["key"]) for f in (shards, folder))
    assert before == after
    assert result.samples == len(after)
    lost, made = (json.loads((f / "index.json").read_text()) for f in (shards, folder))
    for key in ("cases", "counts", "groups", "structures", "shards", "duplicates"):
        assert made[key] == lost[key], key
    assert inspect_shards(read_index(folder)).problems == []


def test_what_only_the_old_index_knows_is_kept_and_who_was_taken_out_stays_out(shards: Path, tmp_path: Path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    summary = json.loads((folder / "index.json").read_text())
    gone = read_index(folder).row(0).patient
    (folder / "index.json").write_text(json.dumps({**summary, "removed_patients": [gone], "mine": 1}))
    (folder / "index.arrow").unlink()
    with pytest.raises(UserError, match="--force"):
        index(folder)
    index(folder, force=True)
    made = json.loads((folder / "index.json").read_text())
    assert made["configuration"] == summary["configuration"]
    assert made["datasets"] == summary["datasets"]
    assert (made["mine"], made["removed_patients"]) == (1, [gone])
    assert gone not in {row.patient for row in rows_of(folder).values()}


def test_foreign_tars_give_training_clips_with_their_own_pixels(tmp_path: Path):
    from medsam2.data.catalog import Catalog
    from medsam2.data.loader import StepDataset
    from medsam2.data.plan import Plan
    from medsam2.data.settings import DataSettings

    arrays = [
        {"__key__": f"a{n}", "npy": npy(picture(n, (6, 20, 24))), "mask.npy": npy(np.stack([labels(n)] * 6))}
        for n in range(3)
    ]
    frames = [
        {"__key__": f"f{n}"}
        | {f"{t:03d}.png": encoded(picture(10 * n + t, (30, 16, 3)), "PNG") for t in range(5)}
        | {f"{t:03d}.seg.png": palette(labels(t, (30, 16))) for t in range(5)}
        for n in range(3)
    ]
    write(tmp_path / "tars" / "array-train-0.tar", arrays)
    write(tmp_path / "tars" / "frame-train-0.tar", frames)
    write(tmp_path / "tars" / "still-train-0.tar", stills(3))
    folder = tmp_path / "index"
    index(tmp_path / "tars", folder)
    settings = DataSettings(shards=(str(folder),), clip_frames=4, max_objects=2, min_pixels=1, temperature=0)
    plan = Plan([Catalog(folder)], settings, seed=3, global_batch=4)
    dataset = StepDataset(plan)
    found = read_index(folder)
    seen = set()
    for step in range(8):
        batch = dataset[step]
        masks = iter(batch.masks.numpy())
        for place, entry in enumerate(plan.batch(step)):
            row, image, planes = load_segment(found, entry.row)
            seen.add((row.codec, row.mask_codec))
            image = (image if image.ndim == 4 else image[..., None])[list(entry.frames)].transpose(0, 3, 1, 2)
            clip = batch.frames[place, :, :, : row.height, : row.width].numpy()
            assert np.array_equal(clip, np.broadcast_to(image, clip.shape))
            for which in entry.objects:
                value = row.objects[which].value
                mask = next(masks)
                assert np.array_equal(mask[:, : row.height, : row.width], planes[0, list(entry.frames)] == value)
        assert batch.lost == ()
    assert seen == {("raw", "raw"), ("png", "png"), ("jpeg", "png")}


def test_splits_come_from_json_then_the_name_and_else_are_shared_by_patient(tmp_path: Path):
    write(tmp_path / "liver-validation-0001.tar", stills(2))
    write(tmp_path / "liver-0002.tar", [*stills(1, first=50, split="test"), *stills(40, first=100, patient="one")])
    write(tmp_path / "liver-0003.tar", stills(40, first=200))
    write(tmp_path / "stated-train-0001.tar", stills(2, first=300))
    assert index(tmp_path).notes == ()  # it is no fault that a stated split is the only one
    rows = rows_of(tmp_path)
    assert rows["000000"].split == rows["000001"].split == "val"
    assert rows["000050"].split == "test"
    assert len({rows[f"{n:06d}"].split for n in range(100, 140)}) == 1
    drawn = [rows[f"{n:06d}"].split for n in range(200, 240)]
    assert 2 <= drawn.count("val") <= 16
    assert set(drawn) == {"train", "val"}
    assert {row.dataset for row in rows.values()} == {"liver", "stated"}


def test_a_split_file_decides_and_what_it_does_not_name_is_left_out(tmp_path: Path):
    write(tmp_path / "liver-train-0.tar", stills(3))
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"test": ["p0"], "val": ["000001"]}))
    result = index(tmp_path, split_file=file)
    assert {key: row.split for key, row in rows_of(tmp_path).items()} == {"000000": "test", "000001": "val"}
    assert reasons(result) == {"000002": "it is in no list of the split file"}
    assert result.summary["configuration"]["split"].startswith("file sha256 ")


def test_equal_keys_of_several_tars_are_several_cases(tmp_path: Path):
    def unnamed(first: int) -> list[dict[str, Any]]:
        found = stills(2, first)
        return [{**sample, "__key__": f"{n}", "json": {}} for n, sample in enumerate(found)]

    write(tmp_path / "a-train-0.tar", unnamed(0))
    write(tmp_path / "a-val-0.tar", unnamed(10))
    write(tmp_path / "b-train-0.tar", unnamed(20))
    index(tmp_path)
    rows = rows_of(tmp_path)
    assert set(rows) == {"a-train-0/0", "a-train-0/1", "a-val-0/0", "a-val-0/1", "0", "1"}
    assert len({row.case for row in rows.values()}) == len({row.patient for row in rows.values()}) == 6


def test_no_name_of_a_person_enters_the_index(tmp_path: Path):
    write(tmp_path / "a.tar", stills(2, case="Smith, John", patient="Smith"))
    index(tmp_path)
    for name in ("index.arrow", "index.json"):
        assert b"Smith" not in (tmp_path / name).read_bytes()


def test_settings_rename_structures_and_find_patients(tmp_path: Path):
    write(tmp_path / "a.tar", [{**s, "__key__": f"smith_{n}", "json": {}} for n, s in enumerate(stills(2))])
    settings = {"patient": "(?P<patient>[^_]+)_", "labels": {"rename": {"object_2": "cyst"}}, "licence": "CC0"}
    result = index(tmp_path, book=SettingsBook(common=DatasetSettings.model_validate(settings)))
    rows = rows_of(tmp_path)
    assert {row.patient for row in rows.values()} == {salted(read_salt(), "patient", "a", "smith")}
    assert [o.name for o in rows["smith_0"].objects] == ["object_1", "cyst"]
    assert result.summary["datasets"]["a"] == {"source": "", "licence": "CC0", "layout": "webdataset"}


def test_a_modality_that_nobody_says_is_asked_for(tmp_path: Path):
    write(tmp_path / "a.tar", stills(1))
    with pytest.raises(UserError, match=r"a\.tar: sample '000000'.*--modality"):
        index(tmp_path, modality="")
    assert not (tmp_path / "index.arrow").exists()


def test_an_index_elsewhere_gets_links_to_the_tars(tmp_path: Path):
    write(tmp_path / "tars" / "a.tar", stills(2))
    result = index(tmp_path / "tars", tmp_path / "deep" / "index")
    assert not (tmp_path / "tars" / "index.arrow").exists()
    assert result.beside
    row, image, _ = load(tmp_path / "deep" / "index", "000001")
    assert row.shard == "a.tar"
    assert image.shape == (1, 20, 24, 3)
    assert inspect_shards(read_index(tmp_path / "deep" / "index")).problems == []
    index(tmp_path / "tars", tmp_path / "deep" / "index", force=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="is another file than"):
        index(tmp_path / "tars", tmp_path / "other")
    assert (tmp_path / "other" / "a.tar").read_bytes() == b"mine"
    assert not (tmp_path / "other" / "index.arrow").exists()


def test_tars_behind_a_url_get_their_index_there(tmp_path: Path):
    import fsspec

    memory = fsspec.filesystem("memory")
    path = write(tmp_path / "a-train-0.tar", stills(2))
    memory.pipe_file("/foreign/tars/a-train-0.tar", path.read_bytes())
    try:
        assert index("memory://foreign/tars").samples == 2
        for name in ("a-train-0.tar", "index.arrow", "index.json"):
            (tmp_path / "copy").mkdir(exist_ok=True)
            (tmp_path / "copy" / name).write_bytes(memory.cat_file(f"/foreign/tars/{name}"))
    finally:
        memory.rm("/foreign", recursive=True)
    assert load(tmp_path / "copy", "000001")[0].dataset == "a"


def test_inspection_and_the_way_back_to_the_source_work_without_records(tmp_path: Path):
    write(tmp_path / "a-train-0.tar", stills(3))
    index(tmp_path)
    found = read_index(tmp_path)
    report = inspect_shards(found)
    assert report.problems == []
    assert report.groups[0].cases == 3
    assert "tars of other tools" in report.histogram_note
    assert load_record(found, 0).objects[0].boxes[0] == (4, 3, 10, 9)
    _, _, planes = load_segment(found, 0)
    mask, affine = source_mask(found, [0], [planes[0]])
    assert affine is None
    assert np.array_equal(mask[0], labels(0))


def test_members_far_apart_are_not_read_with_what_lies_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, payload in (("s.jpg", JPEG), ("s.embedding.bin", bytes(8 << 20)), ("s.mask.png", MASK)):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    index(tmp_path)
    from medsam2.shards import load as module

    lengths: list[int] = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda i, e, o, n: lengths.append(n) or read(i, e, o, n))
    _, _, planes = load(tmp_path, "s")
    assert np.array_equal(planes[0, 0], labels())
    assert lengths == [len(JPEG), len(MASK)]


@pytest.mark.parametrize(
    ("stem", "dataset", "split"),
    [
        ("liver-train-000012", "liver", "train"),
        ("my_set_val_3", "my_set", "val"),
        ("validation-0", "", "val"),
        ("000012", "", ""),
        ("training_data", "data", "train"),
        ("brain-trains-7", "brain-trains", ""),
        ("constrain-7", "constrain", ""),
    ],
)
def test_data_set_and_split_are_read_from_a_tars_name(stem: str, dataset: str, split: str):
    assert names_in(stem) == (dataset, split)


def test_a_folder_without_tars_says_what_is_wrong(tmp_path: Path):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no \.tar file.*compressed"):
        index(tmp_path)
