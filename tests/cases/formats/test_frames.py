from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsam2.cases.case import CaseError
from medsam2.cases.formats.frames import list_frames, read_frames, read_masks


def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path):
    for number in (10, 9, 100):
        Image.new("L", (4, 4), number).save(tmp_path / f"frame{number}.png")
    (tmp_path / ".hidden.png").touch()
    (tmp_path / "notes.txt").touch()
    assert [p.name for p in list_frames(tmp_path)] == ["frame9.png", "frame10.png", "frame100.png"]


def test_palette_masks_give_indices_not_colours(tmp_path: Path, write):
    mask = np.array([[0, 1, 2], [3, 200, 255]], np.uint8)
    write.palette(tmp_path / "m.png", mask)
    assert np.array_equal(read_masks([tmp_path / "m.png"])[0], mask)


def test_sixteen_bit_masks_keep_their_labels(tmp_path: Path):
    mask = np.array([[0, 1], [300, 65535]], np.uint16)
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert np.array_equal(read_masks([tmp_path / "m.png"])[0], mask)


def test_colour_masks_are_refused(tmp_path: Path):
    Image.new("RGB", (4, 4), (0, 1, 2)).save(tmp_path / "m.png")
    with pytest.raises(CaseError, match=r"m\.png: a mask must be a palette or grey picture, found mode RGB"):
        read_masks([tmp_path / "m.png"])


def test_rgb_frames_of_equal_channels_are_stored_grey(tmp_path: Path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    Image.fromarray(np.repeat(grey[..., None], 3, 2)).save(tmp_path / "a.png")
    assert np.array_equal(read_frames([tmp_path / "a.png"])[0], grey)


def test_mixed_grey_and_colour_frames_become_colour(tmp_path: Path):
    Image.new("L", (4, 5), 7).save(tmp_path / "a.png")
    Image.new("RGB", (4, 5), (1, 2, 3)).save(tmp_path / "b.png")
    frames = read_frames([tmp_path / "a.png", tmp_path / "b.png"])
    assert frames.shape == (2, 5, 4, 3)
    assert frames[0, 0, 0].tolist() == [7, 7, 7]


def test_a_cut_jpeg_and_a_frame_of_another_size_are_named(tmp_path: Path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    picture.save(tmp_path / "a.jpg")
    picture.crop((0, 0, 32, 64)).save(tmp_path / "b.jpg")
    with pytest.raises(CaseError, match=r"b\.jpg: size"):
        read_frames([tmp_path / "a.jpg", tmp_path / "b.jpg"])
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    with pytest.raises(CaseError, match=r"b\.jpg: not readable"):
        read_frames([tmp_path / "a.jpg", tmp_path / "b.jpg"])


def test_a_clip_beyond_the_limit_is_refused_at_its_first_frame(tmp_path: Path):
    Image.new("L", (1000, 1000)).save(tmp_path / "a.png")
    with pytest.raises(CaseError, match="more than the limit"):
        read_frames([tmp_path / "a.png"] * 10, limit=10 << 20)
