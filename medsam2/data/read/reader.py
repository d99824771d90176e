"""Entries of the plan into a `ClipBatch`: members are read by offset and decoded straight into the batch's arrays.

For PyTorch's `DataLoader` a step is a number, and gives one rank's whole batch.

Legend: B clips, T frames, C channels, H and W pixels, N objects of the batch, P label planes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from medsam2.data.batch import OBJECTS_PER_PLANE, ClipBatch, num_planes, pack_labels
from medsam2.data.plan.plan import Plan
from medsam2.data.plan.stream import PlanEntry
from medsam2.data.read.catalog import Catalog, Location, ObjectRows
from medsam2.data.read.store import ByteRange
from medsam2.errors import UserError
from medsam2.shards.record import decode_frame, decode_mask

log = logging.getLogger(__name__)
MAX_DAMAGED_IN_A_ROW = 20
"""Segments that are tried for one place of a batch."""
MAX_READ_BYTES = 1 << 24
"""Bytes of one read, so that the memory that a clip needs does not grow with its length."""


class DamagedSegment(UserError):
    """A member of a shard cannot be read; the message names the segment, the file and the offset."""


class Member(NamedTuple):
    """The place of one frame or of its label planes in the tar, in bytes."""

    offset: int
    length: int
    frame: int
    is_mask: bool


@dataclass(frozen=True)
class ResolvedEntry:
    """An entry with what the index says about it; `runs` are the bytes that are read at once, and what is in them."""

    entry: PlanEntry
    catalog: Catalog
    location: Location
    objects: ObjectRows
    runs: tuple[tuple[ByteRange, list[Member]], ...]

    def damaged(self, frame: int, offset: int, error: Exception) -> DamagedSegment:
        """The error for a member that cannot be used."""
        shard = f"{self.catalog.store.shown}/{self.location.shard}"
        return DamagedSegment(
            f"{shard}: segment {self.location.key}, frame {frame} at byte {offset}: {type(error).__name__}: {error}"
        )


class BatchReader:
    """Reads and decodes batches.

    Args:
        catalogs: the shard folders that entries refer to.
        substitute: the entry that replaces one whose segment is damaged (`Plan.substitute`); None: damage is an error.
    """

    def __init__(self, catalogs: Sequence[Catalog], substitute: Callable[[PlanEntry], PlanEntry] | None) -> None:
        self.catalogs = tuple(catalogs)
        self.substitute = substitute
        self._reported: set[str] = set()

    def read(self, entries: Sequence[PlanEntry], step: int, prompt_frame: int = 0) -> ClipBatch:
        """The clips of `entries` (all of the same number of frames) as one batch.

        Raises:
            DamagedSegment: a member is missing, short or does not decode, and there is no `substitute`.
            UserError: `MAX_DAMAGED_IN_A_ROW` segments in a row were damaged, or a shard cannot be reached.
        """
        clips = [self._resolve(entry) for entry in entries]
        misses = [0] * len(clips)
        damaged_keys: list[str] = []
        while True:
            arrays, contents = Arrays(clips), self._contents(clips)
            for place, clip in enumerate(clips):
                try:
                    self._fill(arrays, place, clip, contents[clip.entry.folder])
                except DamagedSegment as error:
                    misses[place] += 1
                    damaged_keys.append(clip.location.key)
                    clips[place] = self._replacement(clip, error, misses[place])
                    break  # the new clip may have another size and other objects: the batch is laid out again
            else:
                return arrays.finish(clips, step, prompt_frame, tuple(damaged_keys))

    def _resolve(self, entry: PlanEntry) -> ResolvedEntry:
        catalog = self.catalogs[entry.folder]
        location = catalog.location(entry.row)
        members = members_of(location, list(dict.fromkeys(entry.frames)))  # a reflected clip shows some frames twice
        runs = []
        for run in runs_of(members, catalog.store.max_gap):
            length = max(member.offset + member.length for member in run) - run[0].offset
            runs.append((ByteRange(location.shard, run[0].offset, length), run))
        return ResolvedEntry(entry, catalog, location, catalog.objects(entry.row), tuple(runs))

    def _contents(self, clips: Sequence[ResolvedEntry]) -> list[Iterator[memoryview]]:
        """Of each folder the bytes of all runs of its clips, which are read when they are asked for."""
        ranges: list[list[ByteRange]] = [[] for _ in self.catalogs]
        for clip in clips:
            ranges[clip.entry.folder] += [wanted for wanted, _ in clip.runs]
        return [catalog.store.read_ranges(own) for catalog, own in zip(self.catalogs, ranges, strict=True)]

    def _replacement(self, clip: ResolvedEntry, error: DamagedSegment, misses: int) -> ResolvedEntry:
        if self.substitute is None:
            raise error
        if clip.location.key not in self._reported:
            self._reported.add(clip.location.key)
            log.warning("skipped and replaced: %s", error)
        if misses >= MAX_DAMAGED_IN_A_ROW:
            raise UserError(f"{misses} damaged segments in a row; prepare the shards again. The last: {error}")
        return self._resolve(self.substitute(clip.entry))

    def _fill(self, arrays: Arrays, place: int, clip: ResolvedEntry, contents: Iterator[memoryview]) -> None:
        """Decode one clip into its place of the batch.

        Raises:
            DamagedSegment: the shard is missing, cannot be read, ends before a member, or does not decode.
        """
        positions: dict[int, list[int]] = {}
        for position, frame in enumerate(clip.entry.frames):
            positions.setdefault(frame, []).append(position)
        for wanted, run in clip.runs:
            try:
                content = next(contents)
            except OSError as error:
                raise clip.damaged(run[0].frame, wanted.offset, error) from error
            for member in run:
                start = member.offset - wanted.offset
                payload = cast(bytes, content[start : start + member.length])  # the decoders take any buffer
                decode = arrays.put_masks if member.is_mask else arrays.put_frame
                try:
                    if len(payload) < member.length:
                        raise EOFError(f"{len(payload)} of {member.length} bytes")
                    decode(place, positions[member.frame], clip, payload)
                except Exception as error:  # every codec has its own exceptions; all mean that the bytes are no use
                    raise clip.damaged(member.frame, member.offset, error) from error
        arrays.clear_padding(place, clip.location)


def members_of(location: Location, frames: Sequence[int]) -> list[Member]:
    """The members of `frames` in the order of the file."""
    members = []
    for offsets, lengths, is_mask in (
        (location.frame_offset, location.frame_length, False),
        (location.mask_offset, location.mask_length, True),
    ):
        for frame, offset, length in zip(frames, offsets[frames].tolist(), lengths[frames].tolist(), strict=True):
            members.append(Member(offset, length, frame, is_mask))
    return sorted(members)


def runs_of(members: Sequence[Member], max_gap: int) -> Iterator[list[Member]]:
    """Neighbours, at most `max_gap` bytes apart, that are read at once: a clip of following frames is one run."""
    run: list[Member] = []
    end = 0
    for member in members:
        stop = member.offset + member.length
        if run and (member.offset - end > max_gap or stop - run[0].offset > MAX_READ_BYTES):
            yield run
            run = []
        run.append(member)
        end = max(end, stop)
    if run:
        yield run


class Arrays:
    """The memory of one batch while it is filled.

    frames: uint8 [B, T, H, W] while all clips are grey, else [B, T, H, W, 3]: each frame lies as it is stored.
    bits: uint8 [K, T, H, W], eight objects of a clip to a plane.
    """

    def __init__(self, clips: Sequence[ResolvedEntry]) -> None:
        height = max(clip.location.height for clip in clips)
        width = max(clip.location.width for clip in clips)
        planes = [num_planes(len(clip.entry.objects)) for clip in clips]
        size = (len(clips[0].entry.frames), height, width)
        colour = any(clip.location.channels == 3 for clip in clips)
        self._first = [sum(planes[:place]) for place in range(len(planes) + 1)]
        self._frames = allocate((len(clips), *size, 3) if colour else (len(clips), *size))
        self._bits = allocate((sum(planes), *size), zero=True)
        self.frames: np.ndarray = self._frames.numpy()
        self.bits: np.ndarray = self._bits.numpy()

    def put_frame(self, place: int, positions: list[int], clip: ResolvedEntry, payload: bytes) -> None:
        """Decode one frame to every position of the clip where it is shown."""
        location = clip.location
        size = (location.height, location.width)
        shape = size if location.channels == 1 else (*size, location.channels)
        frames = self.frames[place]
        if frames.shape[1:] == shape:
            image = decode_frame(payload, location.codec, shape, out=frames[positions[0]])
            positions = positions[1:]
        else:
            image = decode_frame(payload, location.codec, shape)
        for position in positions:
            target = frames[position, : location.height, : location.width]
            target[...] = image if image.ndim == target.ndim else image[..., None]

    def put_masks(self, place: int, positions: list[int], clip: ResolvedEntry, payload: bytes) -> None:
        """Turn the label planes of one frame into the bits of the clip's objects."""
        location, objects, chosen = clip.location, clip.objects, clip.entry.objects
        if not objects.pixels[list(chosen), clip.entry.frames[positions[0]]].any():
            return
        shape = (location.mask_planes, location.height, location.width)
        planes = decode_mask(payload, location.mask_codec, shape, location.mask_dtype)
        for group, target in enumerate(self.bits[self._first[place] : self._first[place + 1]]):
            some = chosen[OBJECTS_PER_PLANE * group : OBJECTS_PER_PLANE * (group + 1)]
            pairs = [(int(objects.planes[which]), int(objects.values[which])) for which in some]
            bits = pack_labels(planes, pairs)
            for position in positions:
                target[position, : location.height, : location.width] = bits

    def clear_padding(self, place: int, location: Location) -> None:
        """Zeros right of and below the frames of a clip that is smaller than the batch."""
        self.frames[place, :, location.height :] = 0
        self.frames[place, :, : location.height, location.width :] = 0

    def finish(
        self, clips: Sequence[ResolvedEntry], step: int, prompt_frame: int, damaged_keys: tuple[str, ...]
    ) -> ClipBatch:
        """The batch, when all places are filled."""
        counts = tuple(len(clip.entry.objects) for clip in clips)
        colour = self._frames.ndim == 5
        return ClipBatch(
            frames=self._frames.permute(0, 1, 4, 2, 3) if colour else self._frames.unsqueeze(2),
            bits=self._bits,
            objects=counts,
            sizes=torch.tensor([(clip.location.height, clip.location.width) for clip in clips], dtype=torch.int64),
            object_to_clip=torch.repeat_interleave(torch.tensor(counts)),
            seeds=torch.tensor([clip.entry.seed for clip in clips], dtype=torch.int64),
            step=step,
            names=tuple(c.catalog.names[c.objects.names[which]] for c in clips for which in c.entry.objects),
            keys=tuple(clip.location.key for clip in clips),
            datasets=tuple(clip.catalog.text("dataset", clip.entry.row) for clip in clips),
            modalities=tuple(clip.catalog.text("modality", clip.entry.row) for clip in clips),
            channels=tuple(clip.location.channels for clip in clips),
            damaged_keys=damaged_keys,
            prompt_frame=prompt_frame,
        )


def allocate(shape: tuple[int, ...], zero: bool = False) -> Tensor:
    """uint8 memory for a part of a batch; in a loader's worker shared memory, so that sending it copies nothing."""
    if get_worker_info() is None:  # by numpy, which asks the system for huge pages
        return torch.from_numpy(np.zeros(shape, np.uint8) if zero else np.empty(shape, np.uint8))
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # zeros; PyTorch's own collate function does the same
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


# For the `DataLoader`


class StepDataset(Dataset[ClipBatch]):
    """Loader step -> the batch of one rank.

    Args:
        plan: its global batch is that of one optimiser step.
        rank, world: this process and how many there are.
        accumulate: loader steps of one optimiser step; a batch carries the optimiser step, so that what a batch
            shares is the same whether ranks or accumulation make up the global batch.
    """

    def __init__(self, plan: Plan, rank: int = 0, world: int = 1, accumulate: int = 1) -> None:
        self.plan = plan
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.reader = BatchReader(plan.catalogs, plan.substitute)

    def __getitem__(self, step: int) -> ClipBatch:
        optimiser_step, accumulated = divmod(step, self.accumulate)
        part = accumulated * self.world + self.rank
        entries = self.plan.part(optimiser_step, part, self.world * self.accumulate)
        return self.reader.read(entries, optimiser_step, self.plan.prompt_frame(optimiser_step))


class FixedDataset(Dataset[ClipBatch]):
    """Batches of fixed entries: item i holds the entries from i * size on."""

    def __init__(self, catalogs: Sequence[Catalog], entries: Sequence[PlanEntry], size: int) -> None:
        self.entries = tuple(entries)
        self.size = size
        self.reader = BatchReader(catalogs, None)

    def __len__(self) -> int:
        return -(-len(self.entries) // self.size)

    def __getitem__(self, index: int) -> ClipBatch:
        return self.reader.read(self.entries[index * self.size : (index + 1) * self.size], index)


class StepSampler(DistributedSampler[int]):
    """The loader steps that are left, asked for when iteration begins.

    It is a `DistributedSampler` in name only: Lightning would replace any other sampler on several ranks, and the
    steps of the plan are already split over them.

    Args:
        length: loader steps in all.
        next_step: the next loader step.
    """

    def __init__(self, length: int, next_step: Callable[[], int]) -> None:
        self.length = length
        self.next_step = next_step

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.next_step(), self.length))

    def __len__(self) -> int:
        return self.length


class StepLoader(DataLoader[ClipBatch]):
    """A `DataLoader` whose whole state is the trainer's step (Lightning asks loaders that can resume for it)."""

    def __iter__(self) -> Iterator[ClipBatch]:  # type: ignore[override]
        """The batches; an error that a worker met is the one sentence that it is, without the worker's traceback."""
        try:
            yield from super().__iter__()
        except UserError as error:
            lines = str(error).strip().splitlines()
            raise UserError(lines[-1].partition(": ")[2] if lines[0].startswith("Caught ") else error) from None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: `StepSampler` asks for the step."""
