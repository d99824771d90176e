from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.intensity import to_uint8
from medsam2.cases.layouts import find_cases, load_case
from medsam2.errors import UserError
from medsam2.shards.index import read_index
from medsam2.shards.load import load_frame, load_segment, stored_spacing
from medsam2.shards.prepare.run import PrepareOptions, prepare
from medsam2.shards.prepare.stage import Recipe


def test_every_mask_comes_back_on_the_original_grid(shards: Path, raw_folder: Path):
    cases = {case.content_hash: case for case in (load_case(ref) for ref in find_cases(raw_folder))}
    index = read_index(shards)
    assert {index.row(i).content_hash for i in range(len(index))} == set(cases)
    for number in range(len(index)):
        row, image, planes = load_segment(index, number)
        case = cases[row.content_hash]
        assert np.array_equal(image, to_uint8(case)[0][row.frames])
        assert np.array_equal(planes, case.planes[:, row.frames])
        outside = np.delete(case.planes, row.frames, axis=1)
        assert not outside.any()
        for obj in row.objects:
            assert obj.pixels == (planes[obj.plane] == obj.value).sum(axis=(1, 2)).tolist()


def test_a_reduced_segment_has_larger_pixels(tmp_path: Path, write):
    prepare(
        write.nnunet(tmp_path / "Dataset001", cases=2),
        tmp_path / "shards",
        PrepareOptions(recipe=Recipe(max_side=24, margin=0)),
    )
    index = read_index(tmp_path / "shards")
    number = next(i for i in range(len(index)) if index.row(i).split == "train")
    row, image, _ = load_segment(index, number)
    assert image.shape == (6, 20, 24)
    assert row.scale == [0.5, 0.5]
    assert stored_spacing(row) == pytest.approx((4.0, 2.0, 2.0))


def test_missing_cut_and_damaged_shards_are_named(shards: Path, tmp_path: Path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    index = read_index(folder)
    path = folder / index.row(0).shard
    content = bytearray(path.read_bytes())
    start = index.row(0).frame_offset[2]
    path.write_bytes(content[:start])
    with pytest.raises(UserError, match=f"{path.name}: ends after at most {start} bytes"):
        load_segment(index, 0)
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load_segment(index, 0)
    path.unlink()
    with pytest.raises(UserError, match="the file is missing"):
        load_segment(index, 0)


def test_one_frame_is_read_as_the_whole_segment_has_it(shards: Path):
    index = read_index(shards)
    for number in range(len(index)):
        row, image, planes = load_segment(index, number)
        frame = len(row.frames) - 1
        one, masks = load_frame(index, row, frame)
        assert np.array_equal(one, image[frame])
        assert np.array_equal(masks, planes[:, frame])
