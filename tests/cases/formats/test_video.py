from __future__ import annotations

from pathlib import Path

import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.formats.video import read_video


def test_all_frames_and_the_rate_are_read(tmp_path: Path, write):
    image, _ = write.clip(0, frames=7, colour=True)
    frames, rate = read_video(write.mp4(tmp_path / "a.mp4", image))
    assert frames.shape == image.shape
    assert rate == pytest.approx(25)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_cut_video_is_refused_and_named(tmp_path: Path, write, share: float):
    path = write.mp4(tmp_path / "a.mp4", write.clip(0, colour=True)[0])
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CaseError, match=r"a\.mp4"):
        read_video(path)


def test_a_text_file_is_no_video(tmp_path: Path):
    (tmp_path / "a.mp4").write_text("hello" * 100)
    with pytest.raises(CaseError, match=r"a\.mp4: damaged"):
        read_video(tmp_path / "a.mp4")


def test_a_video_beyond_the_limit_is_refused(tmp_path: Path, write):
    path = write.mp4(tmp_path / "a.mp4", write.clip(0, colour=True)[0])
    with pytest.raises(CaseError, match="more than the limit"):
        read_video(path, limit=10_000)
