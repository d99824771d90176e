from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsam2.errors import UserError
from medsam2.shards.index import SegmentIndex, read_index, write_index
from medsam2.shards.inspect.tables import case_views, read_tables, spread


def row(case: str, frames: list[int], objects: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    """A row of the index of which only the given parts matter; frames of 40 x 50 pixels of a volume of 12 slices."""
    count = len(frames)
    lists = {
        "frame_offset": [512] * count, "frame_length": [700] * count,
        "mask_offset": [512] * count, "mask_length": [512] * count,
    }  # fmt: skip
    return {
        "key": f"{case}-{frames[0]}", "dataset": "liver", "split": "train", "case": case, "patient": case,
        "content_hash": case, "modality": "CT", "kind": "volume", "frames": frames, "height": 40, "width": 50,
        "channels": 1, "mask_planes": 1, "mask_dtype": "uint8", "spacing": [2.0, 1.0, 0.5], "scale": [1.0, 1.0],
        "codec": "zstd", "mask_codec": "zstd", "window": "-160:240 HU", "original_shape": [12, 40, 50],
        "objects": objects, "shard": "liver-train-000000.tar", "json_offset": 0, "json_length": 1,
    } | lists | other  # fmt: skip


def thing(name: str, value: int, pixels: list[int], boxes: list[list[int]]) -> dict[str, Any]:
    return {"name": name, "value": value, "plane": 0, "pixels": pixels, "boxes": sum(boxes, []), "lines": []}


def make(folder: Path, rows: list[dict[str, Any]]) -> SegmentIndex:
    write_index(folder, rows, {})
    return read_index(folder)


INSIDE, AWAY = [5, 5, 15, 15], [0, 0, 0, 0]
WHOLE = [0, 0, 50, 40]


def test_the_segments_of_a_case_become_one_view(tmp_path: Path):
    liver = [
        thing("liver", 1, [7, 0, 80], [INSIDE, AWAY, INSIDE]),
        thing("liver", 1, [90, 1900], [INSIDE, WHOLE]),
    ]
    lesion = thing("lesion", 2, [0, 1801], [AWAY, WHOLE])
    rows = [row("a", [0, 1, 2], [liver[0]]), row("b", [4, 5], []), row("a", [10, 11], [liver[1], lesion])]
    first, second = case_views(read_tables(make(tmp_path, rows)), {0: np.full(32, 2), 2: np.full(32, 3)})
    assert (first.case, first.segments, first.empty_segments) == ("a", 2, 0)
    assert (first.shape, first.spacing) == ((12, 40, 50), (2.0, 1.0, 0.5))
    assert first.histogram == (5,) * 32
    obj, small = first.objects
    assert (obj.name, obj.frames, obj.largest, obj.fills) == ("liver", 4, 1900, False)
    assert (small.name, small.frames, small.largest, small.fills) == ("lesion", 1, 1801, True)
    assert (second.case, second.empty_segments, second.objects, second.histogram) == ("b", 1, (), ())


def test_an_index_without_objects_is_read_and_one_without_segments_is_refused(tmp_path: Path):
    tables = read_tables(make(tmp_path / "bare", [row("a", [0], []), row("b", [0], [])]))
    assert [view.objects for view in case_views(tables)] == [(), ()]
    with pytest.raises(UserError, match="lists no segment"):
        read_tables(make(tmp_path / "none", []))


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for name in ("bare", "none"):
        (tmp_path / name).mkdir()


def test_batches_give_what_row_by_row_reading_gives(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("medsam2.shards.inspect.tables.SEGMENTS_PER_BATCH", 3)
    index = read_index(shards)
    tables = read_tables(index)
    rows = [index.row(number) for number in range(len(index))]
    assert tables.segments["case"].tolist() == [entry.case for entry in rows]
    assert tables.segments["frames"].tolist() == [len(entry.frames) for entry in rows]
    objects = [(entry.case, obj) for entry in rows for obj in entry.objects]
    largest = [(case, obj.name, max(obj.pixels)) for case, obj in objects]
    assert tables.objects["median"].tolist() == [np.median([n for n in obj.pixels if n]) for _, obj in objects]
    names = ("case", "name", "largest")
    assert list(zip(*(tables.objects[name].tolist() for name in names), strict=True)) == largest
    views = list(case_views(tables))
    assert [view.case for view in views] == list(dict.fromkeys(entry.case for entry in rows))


def test_pictures_are_spread_over_groups_of_very_different_size():
    groups = ["large"] * 1000 + ["middle"] * 10 + ["small"] * 2
    indices = spread(groups, 24)
    assert len(indices) == 24
    assert {name: sum(groups[i] == name for i in indices) for name in set(groups)} == {
        "small": 2, "middle": 10, "large": 12,
    }  # fmt: skip
    assert indices == sorted(set(indices))
    large = [i for i in indices if groups[i] == "large"]
    assert large[0] < 100 and large[-1] > 900


def test_more_groups_than_pictures_still_give_no_more_than_asked_for():
    assert len(spread(list(range(100)), 24)) == 24
    assert spread(["a", "b"], 24) == [0, 1]
    assert spread([], 24) == []
    assert spread(["one"] * 4, 2) == [1, 3]
