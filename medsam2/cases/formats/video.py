"""Video files (MP4, AVI, MOV, MKV, WebM) through PyAV."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.frames import grey_if_equal
from medsam2.cases.formats.limits import MAX_BYTES, check_readable, check_size

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


def read_video(path: Path, limit: int = MAX_BYTES) -> tuple[np.ndarray, float | None]:
    """All frames uint8 [T, H, W, 3] ([T, H, W] where all channels are equal) and the frame rate in Hz, if known.

    Raises:
        CaseError: not a video, cut short, no frames, or too large.
    """
    import av

    check_readable(path)
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise CaseError(f"{path}: holds no video stream.")
            stream = container.streams.video[0]
            rate = float(stream.average_rate) if stream.average_rate else None
            promised = int(stream.frames or 0)
            for frame in container.decode(stream):
                check_size(path, (len(frames) + 1) * frame.width * frame.height * 3, limit)
                frames.append(frame.to_ndarray(format="rgb24"))
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, CaseError):
            raise
        raise CaseError(
            f"{path}: damaged or cut short after {len(frames)} frames ({error}); copy or export it again."
        ) from None
    if not frames or (promised and len(frames) < promised):
        raise CaseError(f"{path}: {len(frames)} frames decode of {promised or 'an unknown number'}; copy it again.")
    if any(f.shape != frames[0].shape for f in frames):
        raise CaseError(f"{path}: the frame size changes within the video; export it with one size.")
    return grey_if_equal(np.stack(frames)), rate
