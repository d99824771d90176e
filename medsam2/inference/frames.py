"""Clips read from disk frame by frame, for `Predictor`: what is in memory does not depend on their length.

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

HELD_FRAMES = 64
"""Decoded frames that a video keeps: backward, each group of frames behind a key frame is decoded once, not T times."""


def open_frames(path: str | Path) -> Frames:
    """A folder of pictures or a video file as a clip.

    Raises:
        UserError: neither of them, or nothing that can be read.
    """
    from medsam2.cases.formats import video

    path = Path(path)
    if path.is_dir():
        return PictureFrames(path)
    if video.recognises(path):
        return VideoFrames(path)
    raise UserError(f"{path}: neither a folder of pictures nor one of {video.READS}.")


class PictureFrames:
    """The 8-bit pictures of a folder, in order of their names (numbers compared as numbers).

    Raises:
        UserError: no pictures; when a frame is read: it cannot be, it is not 8-bit, or of another size than the first.
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
        """uint8 [C, H, W]; C is that of the first picture."""
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
    """The frames of a video file, decoded when they are asked for; going forward costs no seeking.

    Raises:
        UserError: not a video, or cut short.
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
        self._keys = sorted(pts for pts, key in packets if key) or self._times[:1]
        self._place = {pts: index for index, pts in enumerate(self._times)}
        self._held: dict[int, Tensor] = {}
        self._coming: Any = None
        self._next = -1

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, index: int, /) -> Tensor:
        """uint8 [3, H, W]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._held:
            self._decode(index)
        return self._held[index]

    def _decode(self, index: int) -> None:
        """Decode on to `index`, from the key frame before it where that is not ahead."""
        import av

        wanted = self._times[index]
        key = self._keys[max(bisect_right(self._keys, wanted) - 1, 0)]
        if self._coming is None or not self._next <= index or self._place.get(key, 0) > self._next:
            self._container.seek(key, stream=self._stream, backward=True)
            self._coming = self._container.decode(self._stream)
        try:
            for frame in self._coming:
                place = self._place.get(frame.pts)
                if place is None:
                    continue
                self._held[place] = channels_first(frame.to_ndarray(format="rgb24")[None])[0]
                self._next = place + 1
                for old in list(self._held)[: max(len(self._held) - HELD_FRAMES, 0)]:
                    del self._held[old]
                if place == index:
                    return
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{self.path}: damaged at frame {index} ({error}); copy or export it again.") from None
        raise UserError(f"{self.path}: ends before frame {index} of {len(self)}; copy or export it again.")


def channels_first(pictures: np.ndarray) -> Tensor:
    """uint8 [T, H, W] or [T, H, W, 3] to [T, C, H, W]."""
    frames = torch.from_numpy(np.require(pictures, requirements=["C", "W", "O"]))  # torch wants to own what it writes
    return frames[:, None] if frames.ndim == 3 else frames.permute(0, 3, 1, 2).contiguous()
