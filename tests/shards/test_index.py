from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from medsam2.errors import UserError
from medsam2.shards.index import read_index


def test_rows_say_what_the_json_members_say(shards: Path):
    index = read_index(shards)
    for number in range(len(index)):
        row = index.row(number)
        with open(shards / row.shard, "rb") as file:
            file.seek(row.json_offset)
            record = json.loads(file.read(row.json_length))
        assert record["key"] == row.key
        assert record["shape"] == [len(row.frames), row.height, row.width]
        assert [o["pixels"] for o in record["objects"]] == [o.pixels for o in row.objects]
        assert [sum(o["boxes"], []) for o in record["objects"]] == [o.boxes for o in row.objects]
        assert record["spacing"] == row.spacing
        assert len(row.frame_offset) == len(row.mask_length) == len(row.frames)


def test_an_index_travels_to_workers_as_its_folder(shards: Path):
    index = read_index(shards)
    content = pickle.dumps(index)
    assert len(content) < 1000
    assert pickle.loads(content).row(0) == index.row(0)


def test_rows_count_from_the_end_too_and_end_somewhere(shards: Path):
    index = read_index(shards)
    assert index.row(-1) == index.row(len(index) - 1)
    with pytest.raises(IndexError):
        index.row(len(index))


def test_a_folder_without_index_and_a_wrong_name_get_a_hint(shards: Path):
    with pytest.raises(UserError, match=f"Did you mean '{shards}'"):
        read_index(shards.parent)
    with pytest.raises(UserError, match="Did you mean 'shards'"):
        read_index(shards.parent / "shard")


def test_a_damaged_index_is_refused(tmp_path: Path, shards: Path):
    content = (shards / "index.arrow").read_bytes()
    for cut in (0, 100, len(content) // 2, len(content) - 20):
        (tmp_path / "index.arrow").write_bytes(content[:cut])
        with pytest.raises(UserError, match="not a readable index"):
            read_index(tmp_path)
