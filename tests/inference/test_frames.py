"""Frames read one by one from folders, videos and shards are those that are read whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medsam2.cases.formats.video import read_video
from medsam2.errors import UserError
from medsam2.inference.frames import MAX_CACHED_FRAMES, PictureFrames, VideoFrames, open_frames

LENGTH, HEIGHT, WIDTH = MAX_CACHED_FRAMES + 26, 48, 64


def some_frames(channels: int = 3) -> np.ndarray:
    frames = np.random.default_rng(0).integers(0, 255, (LENGTH, HEIGHT // 8, WIDTH // 8, channels), dtype=np.uint8)
    return frames.repeat(8, 1).repeat(8, 2)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import av

    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"g": "12", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in some_frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("order", ["forward", "backward", "jumping"])
def test_video_frames_are_exact_in_any_order(video: Path, order: str) -> None:
    whole, _ = read_video(video)
    frames = open_frames(video)
    assert isinstance(frames, VideoFrames) and len(frames) == len(whole) == LENGTH
    places = {"forward": range(LENGTH), "backward": range(LENGTH - 1, -1, -1)}.get(
        order, np.random.default_rng(1).permutation(LENGTH)
    )
    for place in map(int, places):
        assert np.array_equal(frames[place].permute(1, 2, 0), whole[place]), place
    assert len(frames._cache) <= MAX_CACHED_FRAMES


def test_a_backward_pass_decodes_each_frame_about_once(video: Path) -> None:
    frames, decoded = VideoFrames(video), 0
    indices = frames._index_at

    class Counting(dict):
        def get(self, *arguments):
            nonlocal decoded
            decoded += 1
            return indices.get(*arguments)

    frames._index_at = Counting(indices)
    for index in range(LENGTH - 1, -1, -1):
        frames[index]
    assert decoded <= 2.5 * LENGTH  # one look-up per decoded frame and one per seek


def test_a_cut_video_is_refused_with_its_name(video: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"cut\.mp4"):
        open_frames(cut)


def test_pictures_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    pictures = some_frames(1)[:12, ..., 0]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    frames = open_frames(tmp_path)
    assert isinstance(frames, PictureFrames)
    assert np.array_equal(torch.cat([frames[t] for t in range(len(frames))]), pictures)


@pytest.mark.parametrize(
    ("picture", "what"),
    [
        (np.zeros((HEIGHT, WIDTH), np.uint16), "8 bits"),
        (np.zeros((HEIGHT, WIDTH // 2), np.uint8), "one size"),
        (None, "1.png"),
    ],
)
def test_a_picture_that_does_not_fit_is_refused_with_its_name(tmp_path: Path, picture, what: str) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(tmp_path / "0.png")
    if picture is None:
        (tmp_path / "1.png").write_bytes(b"no picture")
    else:
        Image.fromarray(picture).save(tmp_path / "1.png")
    frames = PictureFrames(tmp_path)
    with pytest.raises(UserError, match=what):
        frames[1]


@pytest.mark.parametrize("missing", ["nothing", "file.txt"])
def test_what_holds_no_frames_is_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / missing, tmp_path / "empty"):
        with pytest.raises(UserError):
            open_frames(path)


def test_grey_and_coloured_pictures_become_what_the_first_one_is(tmp_path: Path) -> None:
    grey, colour = np.full((HEIGHT, WIDTH), 90, np.uint8), some_frames()[0]
    for name, picture in (("a/0", grey), ("a/1", colour), ("b/0", colour), ("b/1", grey)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    assert [tuple(PictureFrames(tmp_path / "a")[t].shape) for t in (0, 1)] == [(1, HEIGHT, WIDTH)] * 2
    assert [tuple(PictureFrames(tmp_path / "b")[t].shape) for t in (0, 1)] == [(3, HEIGHT, WIDTH)] * 2
