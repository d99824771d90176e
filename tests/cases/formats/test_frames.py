from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsam2.cases import raster
from medsam2.cases.case import CaseError
from medsam2.cases.formats.frames import list_frames, read, read_frames, read_mask, recognises
from medsam2.cases.formats.registry import find_format
from medsam2.cases.settings import DatasetSettings


def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path):
    for number in (10, 9, 100):
        Image.new("L", (4, 4), number).save(tmp_path / f"frame{number}.png")
    (tmp_path / ".hidden.png").touch()
    (tmp_path / "notes.txt").touch()
    assert [p.name for p in list_frames(tmp_path)] == ["frame9.png", "frame10.png", "frame100.png"]


def test_palette_masks_give_indices_not_colours(tmp_path: Path, write):
    mask = np.array([[0, 1, 2], [3, 200, 255]], np.uint8)
    write.palette(tmp_path / "m.png", mask)
    assert np.array_equal(read_mask(tmp_path, DatasetSettings()).planes[0][0], mask)


def test_sixteen_bit_masks_keep_their_labels(tmp_path: Path):
    mask = np.array([[0, 1], [300, 65535]], np.uint16)
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path, DatasetSettings()).planes[0][0], mask)


def test_colour_masks_are_refused(tmp_path: Path):
    Image.new("RGB", (4, 4), (0, 1, 2)).save(tmp_path / "m.png")
    with pytest.raises(CaseError, match=r"m\.png: a mask must be a palette or grey picture, found mode RGB"):
        read_mask(tmp_path, DatasetSettings())


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


def test_a_clip_beyond_the_limit_is_refused_at_its_first_frame(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(raster, "MAX_UNPACKED_BYTES", 10 << 20)
    Image.new("L", (1000, 1000)).save(tmp_path / "a.png")
    with pytest.raises(CaseError, match="more than the limit"):
        read_frames([tmp_path / "a.png"] * 10)


def test_a_folder_of_pictures_is_a_clip(tmp_path: Path):
    frames = np.random.default_rng(0).integers(0, 4000, (3, 6, 7), dtype=np.uint16)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    raster = read(tmp_path, DatasetSettings())
    assert find_format(tmp_path).NAME == "frames"
    assert raster.moving
    assert np.array_equal(raster.array, frames)  # sixteen bits stay
    assert np.array_equal(read_mask(tmp_path, DatasetSettings()).planes[0], frames)


def test_frames_of_different_types_are_refused(tmp_path: Path):
    Image.new("L", (4, 5)).save(tmp_path / "a.png")
    Image.fromarray(np.full((5, 4), 300, np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(CaseError, match=r"b\.png: uint16, but a\.png is uint8"):
        read_frames(list_frames(tmp_path))


def test_jpeg_mask_frames_are_marked_as_damaged(tmp_path: Path):
    Image.new("L", (8, 8), 255).save(tmp_path / "a.jpg")
    assert read_mask(tmp_path, DatasetSettings()).lossy


def test_an_empty_folder_is_no_clip(tmp_path: Path):
    assert not recognises(tmp_path)
    with pytest.raises(CaseError, match="holds no frames"):
        read(tmp_path, DatasetSettings())
