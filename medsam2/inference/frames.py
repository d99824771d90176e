"""Clips that `Predictor` reads from disk frame by frame, so that memory use does not depend on their length.

Legend: T frames, C channels (1 or 3), H and W pixels.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsam2.errors import UserError
from medsam2.inference.features import Frames

MAX_CACHED_FRAMES = 64
"""Decoded frames that a video caches; going backward, the frames after a key frame are then decoded only once."""


def open_frames(path: str | Path) -> Frames:
    """Open a folder of pictures or a video file as a clip.

    Raises:
        UserError: `path` is neither of them, or cannot be read.
    """
    from medsam2.cases.formats import video

    path = Path(path)
    if path.is_dir():
        return PictureFrames(path)
    if video.recognises(path):
        return VideoFrames(path)
    raise UserError(f"{path}: neither a folder of pictures nor one of {video.READS}.")


class PictureFrames:
    """The 8-bit pictures of a folder, sorted by name (numbers compared as numbers).

    Raises:
        UserError: the folder has no pictures; or, on access, a frame cannot be read, does not have 8 bits, or differs
            in size from the first.
    """

    def __init__(self, folder: str | Path) -> None:
        from medsam2.cases.formats.frames import list_frames

        self.folder = Path(folder)
        self.paths = list_frames(self.folder)
        if not self.paths:
            raise UserError(f"{self.folder}: holds no pictures; give a folder of PNG, JPEG, BMP or TIFF files.")
        self._shape: tuple[int, ...] = ()
        self._shape = tuple(self[0].shape)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Tensor:
        """Return a frame, uint8 [C, H, W], with as many channels as the first picture."""
        from medsam2.cases.formats.picture import decode

        path = self.paths[index]
        picture = decode(path)
        if picture.dtype != np.uint8:
            raise UserError(f"{path}: holds {picture.dtype} values; export it with 8 bits, or prepare the data first.")
        frame = channels_first(picture[None])[0]
        if self._shape and tuple(frame.shape) != self._shape:
            if frame.shape[1:] != self._shape[1:]:
                raise UserError(
                    f"{path}: {frame.shape[2]} x {frame.shape[1]} px, but the first frame has "
                    f"{self._shape[2]} x {self._shape[1]}; export all frames with one size."
                )
            frame = frame.expand(3, -1, -1) if len(frame) == 1 else frame.float().mean(0, keepdim=True).byte()
        return frame


class VideoFrames:
    """The frames of a video file, decoded on access; reading forward does not seek.

    Raises:
        UserError: the file is not a video, or is truncated.
    """

    def __init__(self, path: str | Path) -> None:
        import av

        self.path = Path(path)
        try:
            self._container: Any = av.open(str(path))
            self._stream = self._container.streams.video[0]
            packets = [(p.pts, p.is_keyframe) for p in self._container.demux(self._stream) if p.pts is not None]
        except (av.FFmpegError, OSError, IndexError) as error:
            raise UserError(f"{path}: no video that can be read ({error}); copy or export it again.") from None
        if not packets:
            raise UserError(f"{path}: the video holds no frames; export it again.")
        self.seconds_per_frame = float(1 / (self._stream.average_rate or 1))
        self._times = sorted(pts for pts, _ in packets)
        self._key_times = sorted(pts for pts, key in packets if key) or self._times[:1]
        self._index_at = {pts: index for index, pts in enumerate(self._times)}
        self._cache: dict[int, Tensor] = {}
        self._decoder: Any = None
        self._next = -1

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, index: int, /) -> Tensor:
        """Return a frame, uint8 [3, H, W]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._cache:
            self._decode(index)
        return self._cache[index]

    def _decode(self, index: int) -> None:
        """Decode up to `index`, starting from the last key frame before it unless the decoder is between the two."""
        import av

        key_time = self._key_times[max(bisect_right(self._key_times, self._times[index]) - 1, 0)]
        if self._decoder is None or self._next > index or self._index_at.get(key_time, 0) > self._next:
            self._container.seek(key_time, stream=self._stream, backward=True)
            self._decoder = self._container.decode(self._stream)
        try:
            for frame in self._decoder:
                decoded = self._index_at.get(frame.pts)
                if decoded is None:
                    continue
                self._cache[decoded] = channels_first(frame.to_ndarray(format="rgb24")[None])[0]
                self._next = decoded + 1
                for oldest in list(self._cache)[: max(len(self._cache) - MAX_CACHED_FRAMES, 0)]:
                    del self._cache[oldest]
                if decoded == index:
                    return
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{self.path}: damaged at frame {index} ({error}); copy or export it again.") from None
        raise UserError(f"{self.path}: ends before frame {index} of {len(self)}; copy or export it again.")


def channels_first(pictures: np.ndarray) -> Tensor:
    """Convert uint8 [T, H, W] or [T, H, W, 3] to [T, C, H, W]."""
    frames = torch.from_numpy(np.require(pictures, requirements=["C", "W", "O"]))  # torch warns of read-only arrays
    return frames[:, None] if frames.ndim == 3 else frames.permute(0, 3, 1, 2).contiguous()
