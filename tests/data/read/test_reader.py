from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from medsam2.data.batch import ClipBatch
from medsam2.data.plan.plan import Plan
from medsam2.data.plan.stream import PlanEntry
from medsam2.data.read import reader as reader_module
from medsam2.data.read.catalog import Catalog
from medsam2.data.read.reader import (
    MAX_DAMAGED_IN_A_ROW,
    BatchReader,
    DamagedSegment,
    Member,
    StepDataset,
    group_members,
)
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError
from medsam2.shards.index import read_index, write_index
from medsam2.shards.load import load_segment
from medsam2.shards.record import encode_frame, encode_mask

SHARD = "demo-train-000000.tar"


def entry(row: int, frames: Sequence[int], objects: Sequence[int] = (0,)) -> PlanEntry:
    return PlanEntry(0, row, tuple(frames), tuple(objects), seed=row + 1, position=0)


def reader_of(folder: Path, substitute: Callable[[PlanEntry], PlanEntry] | None = None) -> BatchReader:
    return BatchReader([Catalog(folder)], substitute)


def next_row(plan_entry: PlanEntry) -> PlanEntry:
    return replace(plan_entry, row=plan_entry.row + 1, attempt=plan_entry.attempt + 1)


def damaged_copy(folder: Path, target: Path, *rows: int) -> Path:
    """A copy of `folder` with one flipped bit in the middle of every frame of some segments."""
    shutil.copytree(folder, target)
    catalog = Catalog(target)
    for row in rows:
        where = catalog.location(row)
        with open(target / where.shard, "r+b") as file:
            for offset, length in zip(where.frame_offset.tolist(), where.frame_length.tolist(), strict=True):
                file.seek(offset + length // 2)
                value = file.read(1)[0]
                file.seek(offset + length // 2)
                file.write(bytes([value ^ 16]))
    return target


def oracle(folder: Path, entries: Sequence[PlanEntry]) -> tuple[np.ndarray, np.ndarray]:
    """Frames [B, T, C, H, W] and masks [N, T, H, W], every frame decoded by itself and padded afterwards."""
    index = read_index(folder)
    clips = [(*load_segment(index, plan_entry.row), plan_entry) for plan_entry in entries]
    height, width = (max(clip[1].shape[axis] for clip in clips) for axis in (1, 2))
    colour = any(clip[1].ndim == 4 for clip in clips)
    frames, masks = [], []
    for row, image, planes, plan_entry in clips:
        image = image[..., None] if image.ndim == 3 else image
        image = np.repeat(image, 3, -1) if colour and image.shape[-1] == 1 else image
        below, right = height - image.shape[1], width - image.shape[2]
        clip_frames = np.pad(image[list(plan_entry.frames)], ((0, 0), (0, below), (0, right), (0, 0)))
        frames.append(clip_frames.transpose(0, 3, 1, 2))
        for object_index in plan_entry.objects:
            label = row.objects[object_index]
            mask = planes[label.plane, list(plan_entry.frames)] == label.value
            masks.append(np.pad(mask, ((0, 0), (0, below), (0, right))))
    return np.stack(frames), np.stack(masks)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read from now on."""
    sizes: list[int] = []
    original = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return sizes


@st.composite
def segments_and_entries(draw: st.DrawFn) -> tuple[list[tuple[int, int, int, bool, int]], list[PlanEntry], int]:
    """Shapes (T, H, W, colour, P) of some segments, entries over them, and a seed for their pixels."""
    shape = st.tuples(st.integers(1, 6), st.integers(1, 30), st.integers(1, 30), st.booleans(), st.integers(1, 2))
    shapes = draw(st.lists(shape, min_size=1, max_size=3))
    count = draw(st.integers(1, 8))
    entries = []
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.integers(0, len(shapes) - 1))
        frames = draw(st.lists(st.integers(0, shapes[row][0] - 1), min_size=count, max_size=count))
        objects = draw(st.lists(st.integers(0, 2 * shapes[row][4] - 1), min_size=1, unique=True))
        entries.append(entry(row, frames, objects))
    return shapes, entries, draw(st.integers(0, 2**16))


@given(segments_and_entries())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_equals_frames_decoded_one_by_one(write_shards: Any, disks: Any, drawn: Any) -> None:
    shapes, entries, seed = drawn
    rng = np.random.default_rng(seed)
    samples = []
    for number, (frames, height, width, colour, planes) in enumerate(shapes):
        sample = disks(number)
        sample.image = rng.integers(0, 256, (frames, height, width, 3) if colour else (frames, height, width), np.uint8)
        sample.planes = rng.integers(0, 4, (planes, frames, height, width), np.uint8)
        sample.names = {(plane, value): f"{plane}{value}" for plane in range(planes) for value in (1, 3)}
        samples.append(sample)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), samples)
        reader = reader_of(Path(folder))
        frames, masks = oracle(Path(folder), entries)
        for _ in range(2):
            batch = reader.read(entries, step=3, prompt_frame=1)
            assert np.array_equal(batch.frames.numpy(), frames) and np.array_equal(batch.masks.numpy(), masks)
        assert (batch.step, batch.prompt_frame, batch.damaged_keys) == (3, 1, ())


def recoded(folder: Path, target: Path, codec: str, mask_codec: str) -> Path:
    """The segments of `folder` with other codecs, one member right after the other."""
    target.mkdir()
    index = read_index(folder)
    rows = index.table.to_pylist()
    with open(target / SHARD, "wb") as file:
        for number, row in enumerate(rows):
            _, image, planes = load_segment(index, number)
            row |= {"codec": codec, "mask_codec": mask_codec}
            for kind in ("frame", "mask"):
                row[f"{kind}_offset"], row[f"{kind}_length"] = [], []
            for frame, labels in zip(image, planes.swapaxes(0, 1), strict=True):
                mask = imagecodecs.png_encode(labels[0]) if mask_codec == "png" else encode_mask(labels, mask_codec)
                for kind, payload in (
                    ("frame", encode_frame(frame, codec)),
                    ("mask", mask),
                ):
                    row[f"{kind}_offset"].append(file.tell())
                    row[f"{kind}_length"].append(file.write(payload))
    write_index(target, rows, {})
    return target


@pytest.mark.parametrize("codecs", [("lz4", "lz4"), ("png", "zstd"), ("jpeg", "png")])
def test_every_codec_is_read_and_a_cut_member_found(shards: Path, tmp_path: Path, codecs: tuple[str, str]) -> None:
    folder = recoded(shards, tmp_path / "other", *codecs)
    entries = [entry(0, (3, 4, 3), (1, 0)), entry(10, (2, 1, 0))]
    frames, masks = oracle(folder, entries)
    batch = reader_of(folder).read(entries, 0)
    assert np.array_equal(batch.frames.numpy(), frames) and np.array_equal(batch.masks.numpy(), masks)
    rows = read_index(folder).table.to_pylist()
    rows[0]["frame_length"][3] //= 2
    rows[10]["mask_length"][1] //= 2
    write_index(folder, rows, {})
    for plan_entry, message in ((entries[0], "c0-00000, frame 3"), (entries[1], "c21-00010, frame 1")):
        with pytest.raises(DamagedSegment, match=message):
            reader_of(folder).read([plan_entry], 0)


def test_the_batch_says_names_sizes_and_seeds(shards: Path) -> None:
    batch = reader_of(shards).read([entry(0, (5, 3, 5), (1, 0)), entry(10, (0, 1, 2))], 9)
    assert batch.names == ("lesion", "organ", "organ") and batch.keys == ("ct-c0-00000", "us-c21-00010")
    assert batch.datasets == ("ct", "us") and batch.modalities == ("CT", "US") and batch.channels == (1, 3)
    assert batch.sizes.tolist() == [[72, 64], [60, 80]] and batch.frames.shape == (2, 3, 3, 72, 80)
    assert batch.object_to_clip.tolist() == [0, 0, 1] and batch.seeds.tolist() == [1, 11]
    assert len(set(batch.object_seeds.tolist())) == 3 and batch.step == 9


def test_colours_lie_interleaved_and_grey_frames_one_after_the_other(shards: Path) -> None:
    reader = reader_of(shards)
    grey, colour = reader.read([entry(0, (0, 1))], 0), reader.read([entry(10, (0, 1))], 0)
    assert grey.frames.is_contiguous() and grey.frames.shape == (1, 2, 1, 72, 64)
    for batch in (colour, colour.to("cpu"), colour._map(torch.clone)):
        assert batch.frames.permute(0, 1, 3, 4, 2).is_contiguous() and batch.frames.shape == (1, 2, 3, 60, 80)


def test_a_clip_of_neighbouring_frames_is_one_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, sizes = reader_of(shards), count_reads(monkeypatch)
    where = reader.catalogs[0].location(1)
    for frames in (range(2, 10), range(9, 1, -1), (2, 9, 2, 3, 4, 5, 6, 7, 8, 9)):
        sizes.clear()
        reader.read([entry(1, frames)], 0)
        assert sizes == [int(where.mask_offset[9] + where.mask_length[9] - where.frame_offset[2])]
    sizes.clear()
    reader.read([entry(1, (11,))], 0)
    assert sizes == [int(where.mask_offset[11] + where.mask_length[11] - where.frame_offset[11])]


def test_far_members_are_not_read_over_and_long_clips_are_read_in_parts() -> None:
    near, gap, most = Member(0, 100, 0, False), 1 << 16, reader_module.MAX_READ_BYTES
    edge, far = Member(100 + gap, 10, 1, False), Member(101 + gap, 10, 1, False)
    assert list(group_members([near, edge], gap)) == [[near, edge]] and list(group_members([near, far], gap)) == [
        [near],
        [far],
    ]
    row = [Member(start, most // 3, frame, False) for frame, start in enumerate(range(0, 2 * most, most // 3))]
    assert [len(run) for run in group_members(row, gap)] == [3, 3, 1] and list(group_members([], gap)) == []
    big = Member(0, 2 * most, 0, False)
    assert list(group_members([big], gap)) == [[big]], "one member is never divided"


def test_a_long_clip_read_in_parts_is_the_same(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reader_of(shards).read([entry(0, range(12))], 0)
    monkeypatch.setattr(reader_module, "MAX_READ_BYTES", 1000)
    sizes = count_reads(monkeypatch)
    parts = reader_of(shards).read([entry(0, range(12))], 0)
    assert len(sizes) > 3 and torch.equal(whole.frames, parts.frames) and torch.equal(whole.masks, parts.masks)


def test_a_damaged_segment_is_named_with_file_and_byte(shards: Path, tmp_path: Path) -> None:
    folder = damaged_copy(shards, tmp_path / "bad", 2)
    offset = Catalog(folder).location(2).frame_offset[1]
    with pytest.raises(DamagedSegment, match=rf"bad/{SHARD}: segment ct-c2-00002, frame 1 at byte {offset}: Corrupt"):
        reader_of(folder).read([entry(2, (1,))], 0)


def test_a_truncated_tar_is_named_with_bytes_found_and_expected(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "cut")
    where = Catalog(tmp_path / "cut").location(4)
    os.truncate(tmp_path / "cut" / where.shard, int(where.frame_offset[1]) + 3)
    reader = reader_of(tmp_path / "cut")
    with pytest.raises(DamagedSegment, match=f"frame 1 .*3 of {where.frame_length[1]} bytes"):
        reader.read([entry(4, (0, 1))], 0)
    with pytest.raises(DamagedSegment, match=f"frame 5 .* 0 of {where.frame_length[5]} bytes"):
        reader.read([entry(4, (5,))], 0)
    reader.read([entry(4, (0,))], 0)  # what lies before the cut is still there


def test_a_missing_shard_is_named(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "gone")
    (tmp_path / "gone" / SHARD).unlink()
    with pytest.raises(DamagedSegment, match=f"gone/{SHARD}: segment ct-c0-00000.*No such file"):
        reader_of(tmp_path / "gone").read([entry(0, (0,))], 0)


def test_a_damaged_segment_is_replaced_and_the_batch_laid_out_again(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = damaged_copy(shards, tmp_path / "bad", 8, 2)  # after the last grey segment a colour one of another size
    reader = reader_of(folder, lambda plan_entry: replace(next_row(plan_entry), objects=(0,)))
    entries = [entry(0, (0, 1)), entry(2, (0, 1), (1, 0)), entry(8, (0, 1), (0, 1)), entry(4, (0, 1))]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            batch = reader.read(entries, 5)
    assert batch.damaged_keys == ("ct-c2-00002", "ct-c8-00008")
    instead = [entries[0], entry(3, (0, 1)), entry(9, (0, 1)), entries[3]]
    frames, masks = oracle(folder, instead)
    assert np.array_equal(batch.frames.numpy(), frames) and np.array_equal(batch.masks.numpy(), masks)
    assert batch.keys == ("ct-c0-00000", "ct-c3-00003", "us-c20-00009", "ct-c4-00004")
    assert batch.object_to_clip.tolist() == [0, 1, 2, 3]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "ct-c2-00002" in messages[0] and "ct-c8-00008" in messages[1], "each is logged once"


def test_the_plan_replaces_by_the_same_data_set_whatever_was_read_before(shards: Path, tmp_path: Path) -> None:
    folder = damaged_copy(shards, tmp_path / "bad", 2)
    clean = StepDataset(Plan([Catalog(shards)], DataSettings(shards=shards, clip_frames=3), 0, 8))
    plan = Plan([Catalog(folder)], DataSettings(shards=folder, clip_frames=3), 0, 8)
    dataset, again = StepDataset(plan), StepDataset(plan)
    batches = [dataset[step] for step in range(6)]
    assert {key for batch in batches for key in batch.damaged_keys} == {"ct-c2-00002"}
    for step, batch in enumerate(batches):
        planned = clean[step]
        assert batch.datasets == planned.datasets and "ct-c2-00002" not in batch.keys
        assert sum(a != b for a, b in zip(batch.keys, planned.keys, strict=True)) == len(batch.damaged_keys)
    assert again[5].keys == batches[5].keys


def test_a_data_set_with_nothing_left_stops_instead_of_searching_for_ever(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "gone")
    (tmp_path / "gone" / SHARD).unlink()
    asked: list[PlanEntry] = []

    def substitute(plan_entry: PlanEntry) -> PlanEntry:
        asked.append(plan_entry)
        return replace(plan_entry, row=(plan_entry.row + 1) % 9)

    with pytest.raises(UserError, match=f"{MAX_DAMAGED_IN_A_ROW} damaged segments in a row.*No such file"):
        reader_of(tmp_path / "gone", substitute).read([entry(0, (0,))], 0)
    assert len(asked) == MAX_DAMAGED_IN_A_ROW - 1


class Batches(Dataset[ClipBatch]):
    """A grey batch, a colour one, a mixed one."""

    def __init__(self, folder: Path) -> None:
        self.reader = reader_of(folder, next_row)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> ClipBatch:
        rows = ((0, 1), (10, 11), (3, 12))[index % 3]
        return self.reader.read([entry(row, (0, 1, 2, 3, 2), (1, 0)) for row in rows], index, prompt_frame=index % 2)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_batches_come_out_of_workers_as_they_were_laid_out(shards: Path, start: str) -> None:
    dataset = Batches(shards)
    dataset[0]  # opens a descriptor that workers must not use
    loader = DataLoader(dataset, batch_size=None, num_workers=2, collate_fn=_as_is, multiprocessing_context=start)
    for index, batch in enumerate(loader):
        expected = dataset[index]
        assert batch.frames.is_shared() and batch.bits.is_shared()
        assert batch.frames.stride() == expected.frames.stride()
        assert torch.equal(batch.frames, expected.frames) and torch.equal(batch.masks, expected.masks)
        assert batch.prompt_frame == index % 2 and batch.keys == expected.keys
    assert index == 5


def _as_is(batch: ClipBatch) -> ClipBatch:
    return batch


class Spied(Batches):
    """Tells of each batch whether the worker filled memory that is shared already."""

    def __getitem__(self, index: int) -> Any:
        batch = super().__getitem__(index)
        return batch.frames.is_shared() and batch.bits.is_shared()


def test_workers_decode_into_shared_memory_and_the_main_process_does_not(shards: Path) -> None:
    spied = Spied(shards)
    assert not spied[0]
    assert all(DataLoader(spied, batch_size=None, num_workers=1, collate_fn=_as_is))
