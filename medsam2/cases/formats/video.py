"""Video files (MP4, AVI, MOV, MKV, WebM) through PyAV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.picture import grey_if_equal, grey_mask
from medsam2.cases.raster import MaskRaster, Raster, check_readable, check_size, explain
from medsam2.cases.settings import DatasetSettings

if TYPE_CHECKING:
    import av

NAME = "video"
READS = "videos (MP4, AVI, MOV, MKV, WebM)"

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
LOSSLESS = ("ffv1", "png", "apng", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "qtrle", "zlib", "mszh", "magicyuv")


def recognises(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_ENDINGS and path.is_file()


def read(path: Path, settings: DatasetSettings) -> Raster:
    frames, rate = read_video(path)
    return Raster(frames, (1.0 / rate if rate else 1.0, 1.0, 1.0), path, moving=True)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """Read grey values of a mask video; only a lossless codec that stores grey or RGB preserves label values.

    Raises:
        CaseError: the mask has colours, or as in `read_video`.
    """

    def to_grey(frame: av.VideoFrame) -> np.ndarray:
        if frame.format.name in ("gray", "gray16le"):
            return frame.to_ndarray()
        # conversion to YUV tints frames and changes values, whatever the codec
        lossy = frame.format.name.startswith("yuv")
        return grey_mask(path, frame.to_ndarray(format="rgb24"), lossy)

    frames, _, lossless = _decode(path, to_grey)
    return MaskRaster(np.stack(frames)[None], path, lossy=not lossless)


def read_video(path: Path) -> tuple[np.ndarray, float | None]:
    """Read all frames, uint8 [T, H, W, 3] ([T, H, W] if all channels are equal), and the frame rate in Hz if known.

    Raises:
        CaseError: not a video, cut short, no frames, or too large.
    """
    frames, rate, _ = _decode(path, lambda frame: frame.to_ndarray(format="rgb24"))
    return grey_if_equal(np.stack(frames)), rate


def _decode(path: Path, convert: Callable[[av.VideoFrame], np.ndarray]) -> tuple[list[np.ndarray], float | None, bool]:
    """Return all frames, the frame rate in Hz if known, and whether codec and pixel format preserve values."""
    import av

    check_readable(path)
    frames: list[np.ndarray] = []
    with explain(path, "damaged or cut short", "copy or export it again"), av.open(str(path)) as container:
        if not container.streams.video:
            raise CaseError(f"{path}: holds no video stream.")
        video = container.streams.video[0]
        rate = float(video.average_rate) if video.average_rate else None
        pixels = str(video.codec_context.pix_fmt or "")
        lossless = video.codec_context.name in LOSSLESS and not pixels.startswith(("yuv", "nv"))
        num_frames = int(video.frames or 0)
        for frame in container.decode(video):
            check_size(path, (len(frames) + 1) * frame.width * frame.height * 3)
            frames.append(convert(frame))
    if not frames or (num_frames and len(frames) < num_frames):
        raise CaseError(
            f"{path}: {len(frames)} of {num_frames or 'an unknown number of'} frames decode; copy it again."
        )
    if any(f.shape != frames[0].shape for f in frames):
        raise CaseError(f"{path}: the frame size changes within the video; export it with one size.")
    return frames, rate, lossless
