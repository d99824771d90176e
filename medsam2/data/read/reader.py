"""Reads the entries of the plan into a `ClipBatch`, and wraps that as datasets and loaders of PyTorch.

Frames and label planes (the members of a shard) are read by byte offset and decoded into the arrays of the batch. An
item of the datasets is a whole batch of one rank, so that the `DataLoader` does not collate.

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
"""Number of segments that are tried for one clip of a batch."""
MAX_READ_BYTES = 1 << 24
"""Largest size of one read, so that the memory for a clip does not grow with its length."""


class DamagedSegment(UserError):
    """A frame or mask cannot be read. The message contains the segment, the file and the byte offset."""


class Member(NamedTuple):
    """One frame, or the label planes of one frame, in a tar.

    Attributes:
        offset, length: in bytes. frame: index in the segment. is_mask: whether it is the label planes.
    """

    offset: int
    length: int
    frame: int
    is_mask: bool


@dataclass(frozen=True)
class ResolvedEntry:
    """An entry of the plan with its rows of the index.

    Attributes:
        runs: the byte ranges to read, each with the members that lie in it.
    """

    entry: PlanEntry
    catalog: Catalog
    location: Location
    objects: ObjectRows
    runs: tuple[tuple[ByteRange, list[Member]], ...]

    def damaged(self, frame: int, offset: int, error: Exception) -> DamagedSegment:
        """Return the error for a member that cannot be read or decoded."""
        shard = f"{self.catalog.store.path}/{self.location.shard}"
        return DamagedSegment(
            f"{shard}: segment {self.location.key}, frame {frame} at byte {offset}: {type(error).__name__}: {error}"
        )


class BatchReader:
    """Reads and decodes batches.

    Args:
        catalogs: the shard folders that entries refer to.
        substitute: returns the entry that replaces one with a damaged segment (`Plan.substitute`); None: damage is an
            error.
    """

    def __init__(self, catalogs: Sequence[Catalog], substitute: Callable[[PlanEntry], PlanEntry] | None) -> None:
        self.catalogs = tuple(catalogs)
        self.substitute = substitute
        self._reported: set[str] = set()

    def read(self, entries: Sequence[PlanEntry], step: int, prompt_frame: int = 0) -> ClipBatch:
        """Read the clips of `entries`, which have the same number of frames, as one batch.

        Raises:
            DamagedSegment: a member is missing, short or cannot be decoded, and there is no `substitute`.
            UserError: `MAX_DAMAGED_IN_A_ROW` segments in a row were damaged, or a shard cannot be reached.
        """
        clips = [self._resolve(entry) for entry in entries]
        failures = [0] * len(clips)
        damaged_keys: list[str] = []
        while True:
            arrays, contents = BatchArrays(clips), self._read_contents(clips)
            for index, clip in enumerate(clips):
                try:
                    self._fill(arrays, index, clip, contents[clip.entry.folder])
                except DamagedSegment as error:
                    failures[index] += 1
                    damaged_keys.append(clip.location.key)
                    clips[index] = self._replace(clip, error, failures[index])
                    break  # The new clip may have another size and other objects: allocate and fill the batch again.
            else:
                return arrays.finish(clips, step, prompt_frame, tuple(damaged_keys))

    def _resolve(self, entry: PlanEntry) -> ResolvedEntry:
        catalog = self.catalogs[entry.folder]
        location = catalog.location(entry.row)
        members = members_of(location, list(dict.fromkeys(entry.frames)))  # A reflected clip repeats frames.
        runs = []
        for run in group_members(members, catalog.store.max_gap):
            length = max(member.offset + member.length for member in run) - run[0].offset
            runs.append((ByteRange(location.shard, run[0].offset, length), run))
        return ResolvedEntry(entry, catalog, location, catalog.objects(entry.row), tuple(runs))

    def _read_contents(self, clips: Sequence[ResolvedEntry]) -> list[Iterator[memoryview]]:
        """Return, for each folder, an iterator that reads the byte ranges of all its clips one after another."""
        ranges: list[list[ByteRange]] = [[] for _ in self.catalogs]
        for clip in clips:
            ranges[clip.entry.folder] += [byte_range for byte_range, _ in clip.runs]
        return [catalog.store.read_ranges(ranges[folder]) for folder, catalog in enumerate(self.catalogs)]

    def _replace(self, clip: ResolvedEntry, error: DamagedSegment, failures: int) -> ResolvedEntry:
        if self.substitute is None:
            raise error
        if clip.location.key not in self._reported:
            self._reported.add(clip.location.key)
            log.warning("skipped and replaced: %s", error)
        if failures >= MAX_DAMAGED_IN_A_ROW:
            raise UserError(f"{failures} damaged segments in a row; prepare the shards again. The last: {error}")
        return self._resolve(self.substitute(clip.entry))

    def _fill(self, arrays: BatchArrays, index: int, clip: ResolvedEntry, contents: Iterator[memoryview]) -> None:
        """Read and decode clip `index` of the batch.

        Raises:
            DamagedSegment: the shard is missing or cannot be read, or a member is cut off or cannot be decoded.
        """
        positions: dict[int, list[int]] = {}
        for position, frame in enumerate(clip.entry.frames):
            positions.setdefault(frame, []).append(position)
        for byte_range, members in clip.runs:
            try:
                content = next(contents)
            except OSError as error:
                raise clip.damaged(members[0].frame, byte_range.offset, error) from error
            for member in members:
                start = member.offset - byte_range.offset
                payload = cast(bytes, content[start : start + member.length])  # The decoders accept any buffer.
                decode = arrays.put_masks if member.is_mask else arrays.put_frame
                try:
                    if len(payload) < member.length:
                        raise EOFError(f"{len(payload)} of {member.length} bytes")
                    decode(index, positions[member.frame], clip, payload)
                except Exception as error:  # Each codec raises its own exceptions for damaged bytes.
                    raise clip.damaged(member.frame, member.offset, error) from error
        arrays.clear_padding(index, clip.location)


def members_of(location: Location, frames: Sequence[int]) -> list[Member]:
    """Return the members of `frames`, sorted by their offset in the tar."""
    members = []
    for offsets, lengths, is_mask in (
        (location.frame_offset, location.frame_length, False),
        (location.mask_offset, location.mask_length, True),
    ):
        for frame, offset, length in zip(frames, offsets[frames].tolist(), lengths[frames].tolist(), strict=True):
            members.append(Member(offset, length, frame, is_mask))
    return sorted(members)


def group_members(members: Sequence[Member], max_gap: int) -> Iterator[list[Member]]:
    """Group sorted members that are at most `max_gap` bytes apart, so that each group is read at once.

    A group spans at most `MAX_READ_BYTES`, except for a single larger member.
    """
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


class BatchArrays:
    """The arrays of one batch while clips are decoded into them.

    Attributes:
        frames: uint8 [B, T, H, W] if all clips are grey, else [B, T, H, W, 3].
        bits: uint8 [K, T, H, W], eight objects of a clip per plane (`PackedMasks`).
    """

    def __init__(self, clips: Sequence[ResolvedEntry]) -> None:
        height = max(clip.location.height for clip in clips)
        width = max(clip.location.width for clip in clips)
        planes = [num_planes(len(clip.entry.objects)) for clip in clips]
        size = (len(clips[0].entry.frames), height, width)
        colour = any(clip.location.channels == 3 for clip in clips)
        self._plane_offsets = [sum(planes[:index]) for index in range(len(planes) + 1)]
        self._frames = allocate((len(clips), *size, 3) if colour else (len(clips), *size))
        self._bits = allocate((sum(planes), *size), zero=True)
        self.frames: np.ndarray = self._frames.numpy()
        self.bits: np.ndarray = self._bits.numpy()

    def put_frame(self, index: int, positions: list[int], clip: ResolvedEntry, payload: bytes) -> None:
        """Decode a frame of clip `index` into each of its positions in the clip."""
        location = clip.location
        size = (location.height, location.width)
        shape = size if location.channels == 1 else (*size, location.channels)
        frames = self.frames[index]
        if frames.shape[1:] == shape:
            image = decode_frame(payload, location.codec, shape, out=frames[positions[0]])
            positions = positions[1:]
        else:
            image = decode_frame(payload, location.codec, shape)
        for position in positions:
            target = frames[position, : location.height, : location.width]
            target[...] = image if image.ndim == target.ndim else image[..., None]

    def put_masks(self, index: int, positions: list[int], clip: ResolvedEntry, payload: bytes) -> None:
        """Decode the label planes of a frame of clip `index` into the bits of its objects."""
        location, table, objects = clip.location, clip.objects, clip.entry.objects
        if not table.pixels[list(objects), clip.entry.frames[positions[0]]].any():
            return
        shape = (location.mask_planes, location.height, location.width)
        planes = decode_mask(payload, location.mask_codec, shape, location.mask_dtype)
        for group, target in enumerate(self.bits[self._plane_offsets[index] : self._plane_offsets[index + 1]]):
            rows = objects[OBJECTS_PER_PLANE * group : OBJECTS_PER_PLANE * (group + 1)]
            bits = pack_labels(planes, [(int(table.planes[row]), int(table.values[row])) for row in rows])
            for position in positions:
                target[position, : location.height, : location.width] = bits

    def clear_padding(self, index: int, location: Location) -> None:
        """Set the pixels right of and below the frames of clip `index` to 0."""
        self.frames[index, :, location.height :] = 0
        self.frames[index, :, : location.height, location.width :] = 0

    def finish(
        self, clips: Sequence[ResolvedEntry], step: int, prompt_frame: int, damaged_keys: tuple[str, ...]
    ) -> ClipBatch:
        """Return the batch after all clips were decoded."""
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
            names=tuple(clip.catalog.names[clip.objects.names[row]] for clip in clips for row in clip.entry.objects),
            keys=tuple(clip.location.key for clip in clips),
            datasets=tuple(clip.catalog.text("dataset", clip.entry.row) for clip in clips),
            modalities=tuple(clip.catalog.text("modality", clip.entry.row) for clip in clips),
            channels=tuple(clip.location.channels for clip in clips),
            damaged_keys=damaged_keys,
            prompt_frame=prompt_frame,
        )


def allocate(shape: tuple[int, ...], zero: bool = False) -> Tensor:
    """Allocate a uint8 tensor; in a worker in shared memory, so that sending it to the main process copies nothing."""
    if get_worker_info() is None:  # numpy asks the system for huge pages.
        return torch.from_numpy(np.zeros(shape, np.uint8) if zero else np.empty(shape, np.uint8))
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # Zeros, as in PyTorch's default collate function.
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


# Datasets and loaders


class StepDataset(Dataset[ClipBatch]):
    """Training batches of one rank, indexed by loader step.

    Args:
        plan: its global batch is that of an optimiser step.
        rank, world: index of this rank, and number of ranks.
        accumulate: loader steps per optimiser step. `ClipBatch.step` is the optimiser step, so that random numbers
            that a batch shares do not depend on how ranks and accumulation divide the global batch.
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
        entries = self.plan.batch(optimiser_step, part, self.world * self.accumulate)
        return self.reader.read(entries, optimiser_step, self.plan.prompt_frame(optimiser_step))


class FixedDataset(Dataset[ClipBatch]):
    """Batches of `size` fixed entries, for validation."""

    def __init__(self, catalogs: Sequence[Catalog], entries: Sequence[PlanEntry], size: int) -> None:
        self.entries = tuple(entries)
        self.size = size
        self.reader = BatchReader(catalogs, None)

    def __len__(self) -> int:
        return -(-len(self.entries) // self.size)

    def __getitem__(self, index: int) -> ClipBatch:
        return self.reader.read(self.entries[index * self.size : (index + 1) * self.size], index)


class StepSampler(DistributedSampler[int]):
    """Yields the remaining loader steps of a run, from the step at which iteration begins.

    The plan already divides a step among ranks. The base class only prevents Lightning from replacing the sampler, as
    it does on several ranks with every sampler that is not a `DistributedSampler`.

    Args:
        length: number of loader steps of the run.
        next_step: returns the next loader step.
    """

    def __init__(self, length: int, next_step: Callable[[], int]) -> None:
        self.length = length
        self.next_step = next_step

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.next_step(), self.length))

    def __len__(self) -> int:
        return self.length


class StepLoader(DataLoader[ClipBatch]):
    """A `DataLoader` that Lightning takes for resumable; its only state is the trainer's step."""

    def __iter__(self) -> Iterator[ClipBatch]:  # type: ignore[override]
        """Yield the batches. An error of a worker is raised with its message alone, without the worker's traceback.

        Raises:
            UserError: as `BatchReader.read`.
        """
        try:
            yield from super().__iter__()
        except UserError as error:
            lines = str(error).strip().splitlines()
            raise UserError(lines[-1].partition(": ")[2] if lines[0].startswith("Caught ") else error) from None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: `StepSampler` takes the step from the trainer."""
