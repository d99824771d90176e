from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsam2.data.catalog import Catalog
from medsam2.data.datamodule import StepDataset
from medsam2.data.plan import Plan, PlanEntry
from medsam2.data.reader import OPEN_FILES, DamagedSegment, Reader, Replacing, stack
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError


def entry(row: int, frames: tuple[int, ...], objects: tuple[int, ...] = (0,)) -> PlanEntry:
    return PlanEntry(0, row, frames, objects, seed=1, position=0)


def damage(folder: Path, target: Path, row: int) -> Path:
    """A copy of `folder` in which every frame of one segment is overwritten with zeros."""
    shutil.copytree(folder, target)
    where = Catalog(target).location(row)
    with open(where.path, "r+b") as file:
        for offset, length in zip(where.frame_offset, where.frame_length, strict=True):
            file.seek(int(offset))
            file.write(bytes(int(length)))
    return target


def test_a_clip_is_what_was_written(write_shards: Any, disks: Any, tmp_path: Path) -> None:
    grey, colour = disks(1, 8), disks(2, 6, (40, 50), True)
    reader = Reader([Catalog(write_shards(tmp_path / "s", [grey, colour]))])
    clip = reader.read(entry(0, (5, 3, 5), (1, 0)))
    assert np.array_equal(clip.frames[:, 0], grey.image[[5, 3, 5]])
    assert np.array_equal(clip.masks[0], grey.planes[0, [5, 3, 5]] == 2)
    assert np.array_equal(clip.masks[1], grey.planes[0, [5, 3, 5]] == 1)
    assert clip.names == ("lesion", "organ")
    clip = reader.read(entry(1, (2,)))
    assert np.array_equal(clip.frames[0], colour.image[2].transpose(2, 0, 1))


def test_objects_of_different_planes_may_overlap(write_shards: Any, disks: Any, tmp_path: Path) -> None:
    sample = disks(1, 4)
    sample.planes = np.concatenate([sample.planes, np.full_like(sample.planes, 7)])
    sample.names = {(0, 1): "organ", (1, 7): "all"}
    clip = Reader([Catalog(write_shards(tmp_path / "s", [sample]))]).read(entry(0, (0, 1), (0, 1)))
    assert clip.masks[1].all() and 0 < clip.masks[0].mean() < 1


def test_a_batch_is_padded_right_and_below_and_says_its_sizes(shards: Path) -> None:
    reader = Reader([Catalog(shards)])
    clips = [reader.read(entry(0, (0, 1), (0, 1))), reader.read(entry(10, (0, 1)))]
    batch = stack(clips, [5, 6], 9)
    assert batch.frames.shape == (2, 2, 3, 72, 80) and batch.sizes.tolist() == [[72, 64], [60, 80]]
    assert batch.object_to_clip.tolist() == [0, 0, 1] and batch.channels == (1, 3)
    assert not batch.frames[0, :, :, :, 64:].any() and not batch.masks[2, :, 60:].any()
    assert (batch.frames[0, :, 0] == batch.frames[0, :, 2]).all()
    assert len(set(batch.object_seeds.tolist())) == 3


def test_a_damaged_segment_is_named_with_file_and_byte(shards: Path, tmp_path: Path) -> None:
    folder = damage(shards, tmp_path / "bad", 2)
    with pytest.raises(DamagedSegment, match=r"demo-train-000000\.tar: segment ct-c2-00002, frame 1 at byte \d+"):
        Reader([Catalog(folder)]).read(entry(2, (1,)))


def test_a_truncated_tar_is_named_with_bytes_found_and_expected(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "cut")
    where = Catalog(tmp_path / "cut").location(4)
    os.truncate(where.path, int(where.frame_offset[0]) + 3)
    with pytest.raises(DamagedSegment, match=f"3 of {where.frame_length[0]} bytes"):
        Reader([Catalog(tmp_path / "cut")]).read(entry(4, (0,)))


def test_a_damaged_segment_is_replaced_by_the_next_of_its_data_set_and_counted(shards: Path, tmp_path: Path) -> None:
    folder = damage(shards, tmp_path / "bad", 2)
    settings = DataSettings(shards=folder, clip_frames=3, max_lost_share=0.2)
    plan = Plan([Catalog(folder)], settings, 0, 8)
    dataset, again = StepDataset(plan), StepDataset(plan, rank=0)
    batches = [dataset[step] for step in range(6)]
    lost = [key for batch in batches for key in batch.lost]
    assert set(lost) == {"ct-c2-00002"} and dataset.load.lost == {"ct-c2-00002": len(lost)}
    for step, batch in enumerate(batches):
        planned = [Catalog(folder).text("dataset", e.row) for e in plan.batch(step)]
        assert list(batch.datasets) == planned and "ct-c2-00002" not in batch.keys
    assert again[5].keys == batches[5].keys, "the replacement does not depend on what was read before"


def test_the_run_stops_when_more_than_the_set_share_is_damaged(shards: Path, tmp_path: Path) -> None:
    folder = damage(shards, tmp_path / "bad", 2)
    settings = DataSettings(shards=folder, clip_frames=3, max_lost_share=0.01)
    dataset = StepDataset(Plan([Catalog(folder)], settings, 0, 8))
    with pytest.raises(UserError, match=r"data\.max_lost_share=0\.01"):
        for step in range(100):
            dataset[step]


def test_a_data_set_with_nothing_left_stops_instead_of_searching_for_ever(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "gone")
    (tmp_path / "gone" / "demo-train-000000.tar").unlink()
    settings = DataSettings(shards=tmp_path / "gone", clip_frames=3, max_lost_share=1.0)
    with pytest.raises(UserError, match="20 damaged segments in a row"):
        StepDataset(Plan([Catalog(tmp_path / "gone")], settings, 0, 8))[0]


def test_without_a_plan_damage_is_an_error(shards: Path, tmp_path: Path) -> None:
    folder = damage(shards, tmp_path / "bad", 2)
    with pytest.raises(DamagedSegment):
        Replacing(Reader([Catalog(folder)]), None, 0.0)(entry(2, (0,)))


def test_few_files_are_open_at_a_time(shards: Path, tmp_path: Path) -> None:
    reader = Reader([Catalog(shards)])
    for number in range(OPEN_FILES + 5):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(b"x")
        assert reader._bytes(path, 0, 1) == b"x"
    assert len(reader._files) == OPEN_FILES
    reader.close()
