from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsam2.cases import raster
from medsam2.cases.case import CaseError
from medsam2.cases.formats.registry import find_format
from medsam2.cases.formats.video import read, read_mask, read_video
from medsam2.cases.settings import DatasetSettings


def test_all_frames_and_the_rate_are_read(tmp_path: Path, write):
    image, _ = write.clip(0, frames=7, colour=True)
    frames, rate = read_video(write.mp4(tmp_path / "a.mp4", image))
    assert frames.shape == image.shape
    assert rate == pytest.approx(25)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_cut_video_is_refused_and_named(tmp_path: Path, write, share: float):
    path = write.mp4(tmp_path / "a.mp4", write.clip(0, colour=True)[0])
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for reader in (read_video, lambda p: read_mask(p, DatasetSettings())):
        with pytest.raises(CaseError, match=r"a\.mp4"):
            reader(path)


def test_a_text_file_is_no_video(tmp_path: Path):
    (tmp_path / "a.mp4").write_text("hello" * 100)
    with pytest.raises(CaseError, match=r"a\.mp4: damaged"):
        read_video(tmp_path / "a.mp4")


def test_a_video_beyond_the_limit_is_refused(tmp_path: Path, write, monkeypatch):
    monkeypatch.setattr(raster, "MAX_UNPACKED_BYTES", 10_000)
    path = write.mp4(tmp_path / "a.mp4", write.clip(0, colour=True)[0])
    with pytest.raises(CaseError, match="more than the limit"):
        read_video(path)


def encode(path: Path, frames: np.ndarray, codec: str, pixels: str) -> Path:
    """Frames [T, H, W] or [T, H, W, 3] in a codec of choice."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        kind = "rgb24" if frames.ndim == 4 else "gray16le" if frames.dtype == np.uint16 else "gray"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format=kind).reformat(format=pixels)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_a_video_is_a_moving_raster_with_its_seconds(tmp_path: Path, write):
    raster = read(write.mp4(tmp_path / "a.mp4", write.clip(0, colour=True)[0]), DatasetSettings())
    assert raster.moving
    assert raster.spacing == pytest.approx((0.04, 1, 1))
    assert find_format(tmp_path / "a.mp4").NAME == "video"


@pytest.mark.parametrize(
    ("codec", "pixels", "kind"),
    [
        ("ffv1", "gray", np.uint8),
        ("ffv1", "gray16le", np.uint16),
        ("ffv1", "bgr0", np.uint8),
        ("png", "gray", np.uint8),
    ],
)
def test_a_mask_video_without_loss_keeps_its_labels(tmp_path: Path, codec: str, pixels: str, kind: type):
    mask = np.zeros((4, 32, 48), kind)
    mask[1, 3:9, 5:20] = 2
    mask[2:, 3:9, 5:20] = np.iinfo(kind).max
    frames = np.repeat(mask[..., None], 3, axis=3) if pixels == "bgr0" else mask
    name = "m.mov" if codec == "png" else "m.mkv"
    raster = read_mask(encode(tmp_path / name, frames, codec, pixels), DatasetSettings())
    assert not raster.lossy
    assert np.array_equal(raster.planes[0], mask)


def test_a_mask_video_with_loss_is_marked(tmp_path: Path):
    mask = np.zeros((4, 32, 48), np.uint8)
    mask[:, 8:24, 8:40] = 255
    raster = read_mask(encode(tmp_path / "m.avi", mask, "mpeg4", "yuv420p"), DatasetSettings())
    assert raster.lossy
    assert np.array_equal(raster.planes[0] > 127, mask > 127)
    raster = read_mask(encode(tmp_path / "n.mkv", mask, "ffv1", "yuv420p"), DatasetSettings())
    assert raster.lossy  # the codec loses nothing, but its colour space does


def test_a_mask_video_in_colours_is_refused(tmp_path: Path):
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[..., 0] = 200
    for name, codec, pixels in (("m.mkv", "ffv1", "bgr0"), ("m.mp4", "mpeg4", "yuv420p")):
        with pytest.raises(CaseError, match=rf"{name}: a mask must be a palette or grey picture"):
            read_mask(encode(tmp_path / name, frames, codec, pixels), DatasetSettings())
