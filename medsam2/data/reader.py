"""Reading the members that a clip uses by offset out of the tars, and stacking clips to a `ClipBatch`.

Legend: T frames, C channels, H and W stored pixels, n objects of a clip, N of the batch, B clips.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from medsam2.data.batch import ClipBatch
from medsam2.data.catalog import Catalog, Location
from medsam2.data.plan import PlanEntry
from medsam2.errors import UserError
from medsam2.shards.record import decode_frame, decode_mask

log = logging.getLogger(__name__)
OPEN_FILES = 32  # descriptors kept open by each worker


class DamagedSegment(UserError):
    """A member of a shard cannot be read; the message names the segment, the file and the offset."""


@dataclass(frozen=True)
class Clip:
    """One decoded clip: frames uint8 [T, C, H, W], masks bool [n, T, H, W], names of the n objects."""

    frames: np.ndarray
    masks: np.ndarray
    names: tuple[str, ...]
    key: str
    dataset: str
    modality: str


class Reader:
    """Decodes the frames of plan entries. Descriptors are opened on first use in each process."""

    def __init__(self, catalogs: Sequence[Catalog]) -> None:
        self.catalogs = tuple(catalogs)
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type[Reader], tuple[tuple[Catalog, ...]]]:
        return Reader, (self.catalogs,)

    def read(self, entry: PlanEntry) -> Clip:
        """The clip of an entry.

        Raises:
            DamagedSegment: a member is missing, short or does not decode.
        """
        catalog = self.catalogs[entry.folder]
        where = catalog.location(entry.row)
        objects = catalog.objects(entry.row)
        chosen = list(entry.objects)
        frames = np.empty((len(entry.frames), where.channels, where.height, where.width), np.uint8)
        masks = np.empty((len(chosen), len(entry.frames), where.height, where.width), bool)
        first_place: dict[int, int] = {}
        for place, frame in enumerate(entry.frames):
            if frame in first_place:  # a reflected clip shows some frames twice
                frames[place] = frames[first_place[frame]]
                masks[:, place] = masks[:, first_place[frame]]
                continue
            first_place[frame] = place
            image, planes = self._decode(where, frame)
            frames[place] = image
            for index, which in enumerate(chosen):
                np.equal(planes[objects.planes[which]], objects.values[which], out=masks[index, place])
        return Clip(
            frames,
            masks,
            tuple(catalog.names[objects.names[which]] for which in chosen),
            where.key,
            catalog.text("dataset", entry.row),
            catalog.text("modality", entry.row),
        )

    def _decode(self, where: Location, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """One frame as uint8 [C, H, W] and its label planes [P, H, W]."""
        size = (where.height, where.width)
        offset = int(where.frame_offset[frame])
        try:
            data = self._bytes(where.path, offset, int(where.frame_length[frame]))
            image = decode_frame(data, where.codec, size if where.channels == 1 else (*size, where.channels))
            offset = int(where.mask_offset[frame])
            data = self._bytes(where.path, offset, int(where.mask_length[frame]))
            planes = decode_mask(data, where.mask_codec, (where.mask_planes, *size), where.mask_dtype)
        except Exception as error:  # every codec has its own exceptions; all mean that these bytes are no use
            raise DamagedSegment(
                f"{where.path}: segment {where.key}, frame {frame} at byte {offset}: {type(error).__name__}: {error}"
            ) from error
        return (image[None] if where.channels == 1 else image.transpose(2, 0, 1)), planes

    def _bytes(self, path: Path, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor(path), length, offset)
        if len(data) != length:
            raise EOFError(f"{len(data)} of {length} bytes")
        return data

    def _descriptor(self, path: Path) -> int:
        if self._process != os.getpid():  # after a fork: leave the parent's descriptors alone
            self._files, self._process = OrderedDict(), os.getpid()
        if path not in self._files:
            while len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[path] = os.open(path, os.O_RDONLY)
        self._files.move_to_end(path)
        return self._files[path]

    def close(self) -> None:
        """Close what this process opened."""
        if self._process == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)
        self._files.clear()


class Replacing:
    """Reads entries, replacing damaged segments by the next of their data set, up to a share of what is read.

    Args:
        reader: decodes.
        substitute: (position, attempt) -> entry; `Plan.entry`. None: damage is an error at once.
        max_lost_share: stop beyond this share, once five reads were lost.
    """

    ATTEMPTS = 20
    TOLERATED = 5

    def __init__(
        self, reader: Reader, substitute: Callable[[int, int], PlanEntry] | None, max_lost_share: float
    ) -> None:
        self.reader = reader
        self.substitute = substitute
        self.max_lost_share = max_lost_share
        self.read = 0
        self.lost: dict[str, int] = {}

    def __call__(self, entry: PlanEntry) -> tuple[Clip, PlanEntry, tuple[str, ...]]:
        """The clip, the entry that it came from, and the keys of segments that were lost on the way."""
        lost: list[str] = []
        while True:
            self.read += 1
            try:
                return self.reader.read(entry), entry, tuple(lost)
            except DamagedSegment as error:
                if self.substitute is None:
                    raise
                key = self.reader.catalogs[entry.folder].text("key", entry.row)
                lost.append(key)
                self._count(key, error)
                if len(lost) >= self.ATTEMPTS:
                    raise UserError(f"{len(lost)} damaged segments in a row, the last: {error}") from error
                entry = self.substitute(entry.position, entry.attempt + 1)

    def _count(self, key: str, error: DamagedSegment) -> None:
        if key not in self.lost:
            log.warning("skipped and replaced: %s", error)
        self.lost[key] = self.lost.get(key, 0) + 1
        total = sum(self.lost.values())
        if total > self.TOLERATED and total > self.max_lost_share * self.read:
            raise UserError(
                f"{total} of {self.read} segments read are damaged, more than data.max_lost_share="
                f"{self.max_lost_share}; the last: {error}. Prepare the shards again, or raise the share."
            )


def stack(clips: Sequence[Clip], seeds: Sequence[int], step: int, lost: tuple[str, ...] = ()) -> ClipBatch:
    """Clips as one batch, padded with zeros right and below to the largest; grey becomes RGB if any clip is RGB."""
    height = max(clip.frames.shape[2] for clip in clips)
    width = max(clip.frames.shape[3] for clip in clips)
    channels = max(clip.frames.shape[1] for clip in clips)
    count = clips[0].frames.shape[0]
    frames = np.zeros((len(clips), count, channels, height, width), np.uint8)
    masks = np.zeros((sum(len(clip.masks) for clip in clips), count, height, width), bool)
    place = 0
    for index, clip in enumerate(clips):
        rows, columns = clip.frames.shape[2:]
        frames[index, :, :, :rows, :columns] = clip.frames
        masks[place : place + len(clip.masks), :, :rows, :columns] = clip.masks
        place += len(clip.masks)
    return ClipBatch(
        frames=torch.from_numpy(frames),
        masks=torch.from_numpy(masks),
        sizes=torch.tensor([clip.frames.shape[2:] for clip in clips], dtype=torch.int64),
        object_to_clip=torch.repeat_interleave(torch.tensor([len(clip.masks) for clip in clips])),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        step=step,
        names=tuple(name for clip in clips for name in clip.names),
        keys=tuple(clip.key for clip in clips),
        datasets=tuple(clip.dataset for clip in clips),
        modalities=tuple(clip.modality for clip in clips),
        channels=tuple(clip.frames.shape[1] for clip in clips),
        lost=lost,
    )
