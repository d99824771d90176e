"""Entries of the plan into a `ClipBatch`: members are read by offset and decoded straight into the batch's arrays.

Legend: B clips, T frames, C channels, H and W pixels, N objects of the batch, P label planes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from medsam2.data.batch import ClipBatch
from medsam2.data.catalog import Catalog, Location, ObjectRows
from medsam2.data.entry import PlanEntry
from medsam2.data.masks import EACH, labelled_rows, pack_labels, planes_of
from medsam2.data.open_files import OpenFiles, Stretch
from medsam2.errors import UserError
from medsam2.shards.record import decode_frame, decode_mask

log = logging.getLogger(__name__)
ATTEMPTS = 20  # damaged segments in a row for one place of a batch
MOST = 1 << 24  # bytes of one read: the memory that a clip needs does not grow with its length


class DamagedSegment(UserError):
    """A member of a shard cannot be read; the message names the segment, the file and the offset."""


class Member(NamedTuple):
    """The place of one frame or of its label planes in the tar, in bytes."""

    offset: int
    length: int
    frame: int
    is_mask: bool


@dataclass(frozen=True)
class Chosen:
    """An entry with what the index says about it; `runs` are the bytes that are read at once, and what is in them."""

    entry: PlanEntry
    catalog: Catalog
    where: Location
    objects: ObjectRows
    runs: tuple[tuple[Stretch, list[Member]], ...]

    def damaged(self, frame: int, offset: int, error: Exception) -> DamagedSegment:
        """What to say of a member that cannot be used."""
        shard = self.catalog.store.named(self.where.shard)
        return DamagedSegment(
            f"{shard}: segment {self.where.key}, frame {frame} at byte {offset}: {type(error).__name__}: {error}"
        )


class BatchReader:
    """Reads and decodes batches. Files are opened on first use in each process.

    Args:
        catalogs: the shard folders that entries refer to.
        substitute: the entry that replaces one whose segment is damaged (`Plan.substitute`); None: damage is an error.
    """

    def __init__(self, catalogs: Sequence[Catalog], substitute: Callable[[PlanEntry], PlanEntry] | None) -> None:
        self.catalogs = tuple(catalogs)
        self.substitute = substitute
        self.files = OpenFiles()
        self._scratch = Scratch()
        self._reported: set[str] = set()

    def __reduce__(self) -> tuple[type[BatchReader], tuple[object, ...]]:
        return BatchReader, (self.catalogs, self.substitute)

    def read(self, entries: Sequence[PlanEntry], step: int, prompt_frame: int = 0) -> ClipBatch:
        """The clips of `entries` (all of the same number of frames) as one batch.

        Raises:
            DamagedSegment: a member is missing, short or does not decode, and there is no `substitute`.
            UserError: 20 segments in a row were damaged.
        """
        wanted = [self._choose(entry) for entry in entries]
        misses = [0] * len(wanted)
        lost: list[str] = []
        while True:
            self._announce(wanted)
            arrays = Arrays(wanted)
            for place, chosen in enumerate(wanted):
                try:
                    self._fill(arrays, place, chosen)
                except DamagedSegment as error:
                    misses[place] += 1
                    lost.append(chosen.where.key)
                    wanted[place] = self._replacement(chosen, error, misses[place])
                    break  # the new clip may have another size and other objects: the batch is laid out again
            else:
                return arrays.finish(wanted, step, prompt_frame, tuple(lost))

    def _choose(self, entry: PlanEntry) -> Chosen:
        catalog = self.catalogs[entry.folder]
        where = catalog.location(entry.row)
        found = members(where, list(dict.fromkeys(entry.frames)))  # a reflected clip shows some frames twice
        own = tuple((stretch_of(where.shard, run), run) for run in runs(found, catalog.store.gap))
        return Chosen(entry, catalog, where, catalog.objects(entry.row), own)

    def _announce(self, wanted: Sequence[Chosen]) -> None:
        """Tell each store what is read next."""
        for number, catalog in enumerate(self.catalogs):
            own = [chosen for chosen in wanted if chosen.entry.folder == number]
            catalog.store.expect([stretch for chosen in own for stretch, _ in chosen.runs])

    def _replacement(self, chosen: Chosen, error: DamagedSegment, misses: int) -> Chosen:
        if self.substitute is None:
            raise error
        if chosen.where.key not in self._reported:
            self._reported.add(chosen.where.key)
            log.warning("skipped and replaced: %s", error)
        if misses >= ATTEMPTS:
            raise UserError(f"{misses} damaged segments in a row; prepare the shards again. The last: {error}")
        return self._choose(self.substitute(chosen.entry))

    def _fill(self, arrays: Arrays, place: int, chosen: Chosen) -> None:
        """Decode one clip into its place of the batch."""
        positions: dict[int, list[int]] = {}
        for position, frame in enumerate(chosen.entry.frames):
            positions.setdefault(frame, []).append(position)
        for stretch, run in chosen.runs:
            content = self._read(chosen, stretch, run)
            for member in run:
                start = member.offset - stretch.offset
                payload = cast(bytes, content[start : start + member.length])  # the decoders take any buffer
                decode = self._masks if member.is_mask else self._frame
                try:
                    decode(arrays, place, positions[member.frame], chosen, payload)
                except Exception as error:  # every codec has its own exceptions; all mean that the bytes are no use
                    raise chosen.damaged(member.frame, member.offset, error) from error
        arrays.clear_padding(place, chosen.where)

    def _read(self, chosen: Chosen, wanted: Stretch, run: Sequence[Member]) -> memoryview:
        """The bytes of a run, in memory that the next one overwrites.

        Raises:
            DamagedSegment: the shard is missing, cannot be read, is not what the index describes, or ends before.
        """
        view = memoryview(self._scratch.grown("file", wanted.length))[: wanted.length]
        try:
            done = chosen.catalog.store.read(wanted, view, self.files)
        except OSError as error:
            raise chosen.damaged(run[0].frame, wanted.offset, error) from error
        for member in run:
            found = wanted.offset + done - member.offset
            if found < member.length:
                short = EOFError(f"{max(0, found)} of {member.length} bytes")
                raise chosen.damaged(member.frame, member.offset, short)
        return view

    def _frame(self, arrays: Arrays, place: int, positions: list[int], chosen: Chosen, payload: bytes) -> None:
        where = chosen.where
        shape: tuple[int, ...] = (where.height, where.width)
        shape = shape if where.channels == 1 else (*shape, where.channels)
        data = bytes(payload) if where.codec in ("png", "jpeg") else payload
        frames = arrays.frames[place]
        if frames.shape[1:] == shape:
            decode_frame(data, where.codec, shape, out=frames[positions[0]])
            for position in positions[1:]:
                frames[position] = frames[positions[0]]
            return
        image = decode_frame(data, where.codec, shape, out=self._scratch.array("frame", shape, "uint8"))
        for position in positions:
            target = frames[position, : where.height, : where.width]
            target[...] = image if image.ndim == target.ndim else image[..., None]

    def _masks(self, arrays: Arrays, place: int, positions: list[int], chosen: Chosen, payload: bytes) -> None:
        """The label planes of one frame into the bits of the clip's objects."""
        where, objects = chosen.where, chosen.objects
        if not objects.pixels[list(chosen.entry.objects), chosen.entry.frames[positions[0]]].any():
            return
        shape = (where.mask_planes, where.height, where.width)
        data = bytes(payload) if where.mask_codec == "png" else payload
        out = self._scratch.array("mask", shape, where.mask_dtype)
        planes = decode_mask(data, where.mask_codec, shape, where.mask_dtype, out=out)
        top, bottom = labelled_rows(planes)  # pages of zeros are never touched, hence free
        if top == bottom:
            return
        rows = (bottom - top, where.width)
        found, more = (self._scratch.array(use, rows, "uint8") for use in ("found", "more"))
        for group, target in enumerate(arrays.bits_of(place)):
            chosen_here = chosen.entry.objects[EACH * group : EACH * (group + 1)]
            pairs = [(int(objects.planes[which]), int(objects.values[which])) for which in chosen_here]
            pack_labels(planes[:, top:bottom], pairs, found, more)
            for position in positions:
                target[position, top:bottom, : where.width] = found


def members(where: Location, frames: Sequence[int]) -> list[Member]:
    """The members of `frames` in the order of the file."""
    found = []
    for offsets, lengths, is_mask in (
        (where.frame_offset, where.frame_length, False),
        (where.mask_offset, where.mask_length, True),
    ):
        for frame, offset, length in zip(frames, offsets[frames].tolist(), lengths[frames].tolist(), strict=True):
            found.append(Member(offset, length, frame, is_mask))
    return sorted(found)


def runs(found: Sequence[Member], gap: int) -> Iterator[list[Member]]:
    """Neighbours, at most `gap` bytes apart, that are read at once: a clip of following frames is one run."""
    run: list[Member] = []
    end = 0
    for member in found:
        stop = member.offset + member.length
        if run and (member.offset - end > gap or stop - run[0].offset > MOST):
            yield run
            run = []
        run.append(member)
        end = max(end, stop)
    if run:
        yield run


def stretch_of(shard: str, run: Sequence[Member]) -> Stretch:
    """The bytes from the first member of a run to the end of its last."""
    first = run[0]
    end = max(member.offset + member.length for member in run)
    return Stretch(shard, first.offset, end - first.offset, first.length)


class Scratch:
    """Memory that is kept from clip to clip, since fresh pages cost more than decoding into them."""

    def __init__(self) -> None:
        self._memory: dict[str, bytearray] = {}

    def array(self, use: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The little-endian array [*shape] for a use; its old content is left in it."""
        kind, count = np.dtype(dtype).newbyteorder("<"), math.prod(shape)
        return np.frombuffer(self.grown(use, count * kind.itemsize), kind, count).reshape(shape)

    def grown(self, use: str, size: int) -> bytearray:
        """At least `size` bytes for a use, the same ones as long as they suffice."""
        found = self._memory.get(use)
        if found is None or len(found) < size:
            found = self._memory[use] = bytearray(size + size // 4)
        return found


class Arrays:
    """The memory of one batch while it is filled.

    frames: uint8 [B, T, H, W] while all clips are grey, else [B, T, H, W, 3]: each frame lies as it is stored.
    bits: uint8 [K, T, H, W], eight objects of a clip to a plane.
    """

    def __init__(self, wanted: Sequence[Chosen]) -> None:
        height = max(chosen.where.height for chosen in wanted)
        width = max(chosen.where.width for chosen in wanted)
        planes = [planes_of(len(chosen.entry.objects)) for chosen in wanted]
        size = (len(wanted[0].entry.frames), height, width)
        colour = any(chosen.where.channels == 3 for chosen in wanted)
        self._first = [sum(planes[:place]) for place in range(len(planes) + 1)]
        self._frames = allocate((len(wanted), *size, 3) if colour else (len(wanted), *size))
        self._bits = allocate((sum(planes), *size), zero=True)
        self.frames: np.ndarray = self._frames.numpy()
        self.bits: np.ndarray = self._bits.numpy()

    def bits_of(self, place: int) -> np.ndarray:
        """The planes [G, T, H, W] of one clip."""
        return self.bits[self._first[place] : self._first[place + 1]]

    def clear_padding(self, place: int, where: Location) -> None:
        """Zeros right of and below the frames of a clip that is smaller than the batch."""
        self.frames[place, :, where.height :] = 0
        self.frames[place, :, : where.height, where.width :] = 0

    def finish(self, wanted: Sequence[Chosen], step: int, prompt_frame: int, lost: tuple[str, ...]) -> ClipBatch:
        """The batch, when all places are filled."""
        counts = tuple(len(chosen.entry.objects) for chosen in wanted)
        colour = self._frames.ndim == 5
        return ClipBatch(
            frames=self._frames.permute(0, 1, 4, 2, 3) if colour else self._frames.unsqueeze(2),
            bits=self._bits,
            objects=counts,
            sizes=torch.tensor([(chosen.where.height, chosen.where.width) for chosen in wanted], dtype=torch.int64),
            object_to_clip=torch.repeat_interleave(torch.tensor(counts)),
            seeds=torch.tensor([chosen.entry.seed for chosen in wanted], dtype=torch.int64),
            step=step,
            names=tuple(c.catalog.names[c.objects.names[which]] for c in wanted for which in c.entry.objects),
            keys=tuple(chosen.where.key for chosen in wanted),
            datasets=tuple(chosen.catalog.text("dataset", chosen.entry.row) for chosen in wanted),
            modalities=tuple(chosen.catalog.text("modality", chosen.entry.row) for chosen in wanted),
            channels=tuple(chosen.where.channels for chosen in wanted),
            lost=lost,
            prompt_frame=prompt_frame,
        )


def allocate(shape: tuple[int, ...], zero: bool = False) -> Tensor:
    """uint8 memory for a part of a batch; in a loader's worker shared memory, so that sending it copies nothing."""
    if get_worker_info() is None:  # by numpy, which asks the system for huge pages
        return torch.from_numpy(np.zeros(shape, np.uint8) if zero else np.empty(shape, np.uint8))
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # zeros; PyTorch's own collate function does the same
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
