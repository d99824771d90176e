from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsam2.errors import UserError
from medsam2.shards.index import SegmentIndex, read_index, write_index
from medsam2.shards.tables import case_views, read_tables


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
SIDE, LOW, WHOLE = [40, 5, 50, 15], [5, 30, 15, 40], [0, 0, 50, 40]


def test_the_segments_of_a_case_become_one_view(tmp_path: Path):
    liver = [
        thing("liver", 1, [7, 0, 80], [INSIDE, AWAY, SIDE]),
        thing("liver", 1, [90, 1900], [LOW, WHOLE]),
    ]
    lesion = thing("lesion", 2, [0, 3], [AWAY, INSIDE])
    rows = [row("a", [0, 1, 2], [liver[0]]), row("b", [4, 5], []), row("a", [10, 11], [liver[1], lesion])]
    first, second = case_views(read_tables(make(tmp_path, rows)), {0: np.full(32, 2), 2: np.full(32, 3)})
    assert (first.case, first.segments, first.bare) == ("a", 2, 0)
    assert (first.shape, first.spacing) == ((12, 40, 50), (2.0, 1.0, 0.5))
    assert first.histogram == (5,) * 32
    found, small = first.objects
    assert (found.name, found.frames, found.largest) == ("liver", 4, 1900)
    assert (found.border, found.filling) == (3, 1)
    assert (found.first, found.last) == (True, True)
    assert (small.frames, small.largest, small.border, small.first, small.last) == (1, 3, 0, False, True)
    assert (second.case, second.bare, second.objects, second.histogram) == ("b", 1, (), ())


def test_the_last_frame_of_a_segment_is_not_the_last_of_the_case(tmp_path: Path):
    rows = [row("a", [3, 4], [thing("liver", 1, [9, 9], [INSIDE, INSIDE])])]
    (view,) = case_views(read_tables(make(tmp_path, rows)))
    assert (view.objects[0].first, view.objects[0].last) == (False, False)


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
    monkeypatch.setattr("medsam2.shards.tables.BATCH", 3)
    index = read_index(shards)
    tables = read_tables(index)
    rows = [index.row(number) for number in range(len(index))]
    assert tables.segments["case"].tolist() == [entry.case for entry in rows]
    assert tables.segments["frames"].tolist() == [len(entry.frames) for entry in rows]
    objects = [(entry.case, found) for entry in rows for found in entry.objects]
    largest = [(case, found.name, max(found.pixels)) for case, found in objects]
    assert tables.pixels.tolist() == [count for _, found in objects for count in found.pixels if count]
    names = ("case", "name", "largest")
    assert list(zip(*(tables.objects[name].tolist() for name in names), strict=True)) == largest
    views = list(case_views(tables))
    assert [view.case for view in views] == list(dict.fromkeys(entry.case for entry in rows))
