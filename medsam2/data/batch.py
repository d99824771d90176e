"""`ClipBatch`: a batch of clips as it is read from shards and sent to the device.

Legend: B clips, T frames, C channels, H and W pixels, N objects and K bit planes of the batch; n objects, G bit planes
of eight objects, and P label planes of a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

OBJECTS_PER_PLANE = 8


@dataclass(frozen=True)
class PackedMasks:
    """The masks of a clip as bits, which take an eighth of the memory and of the time to copy.

    Attributes:
        bits: uint8 [G, T, H, W]; bit b of plane g is the mask of object 8 g + b. count: n.
    """

    bits: Tensor
    count: int

    def object(self, index: int) -> Tensor:
        """Return the mask of one object: bool [T, H, W]."""
        return (self.bits[index // OBJECTS_PER_PLANE] & (1 << index % OBJECTS_PER_PLANE)) != 0

    def unpack(self) -> Tensor:
        """Return all masks: bool [n, T, H, W]."""
        return torch.stack([self.object(index) for index in range(self.count)])

    def present(self, frame: int) -> Tensor:
        """Return which objects have a pixel on a frame: bool [n]."""
        on_frame = PackedMasks(self.bits[:, frame : frame + 1], self.count)
        return torch.stack([on_frame.object(index).any() for index in range(self.count)])


def num_planes(count: int) -> int:
    """Return G, the number of bit planes, for n objects."""
    return -(-count // OBJECTS_PER_PLANE)


def pack_labels(planes: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Convert label planes [P, H, W] to uint8 [H, W]. Bit b is the mask of the b-th pair of plane and value."""
    bits = np.zeros(planes.shape[1:], np.uint8)
    for bit, (plane, value) in enumerate(pairs):
        # `value` is a Python integer, so that numpy compares in the dtype of the planes, eight times faster.
        bits |= (planes[plane] == value).view(np.uint8) << np.uint8(bit)
    return bits


@dataclass(frozen=True)
class ClipBatch:
    """A batch of clips with their objects. Frames and bits go to the device; all other fields stay on the CPU.

    Attributes:
        frames: uint8 [B, T, C, H, W], C = 1 if all clips are grey, else 3; zero-padded right and below. Colour frames
            are interleaved in memory (a permuted [B, T, H, W, 3]), as they are stored.
        bits: uint8 [K, T, H, W] on the same grid: the masks of each clip's objects, eight per plane (`PackedMasks`).
        objects: number of objects of each clip (B).
        sizes: int64 [B, 2], (height, width) of each clip inside the padded frame.
        object_to_clip: int64 [N], the clip of each object, ascending.
        seeds: int64 [B], the plan's seed of each clip, from which all its random numbers derive.
        step: optimiser step of the plan; random numbers that the batch shares derive from (seed, step).
        names: structure name of each object (N). keys, datasets, modalities: of each clip (B).
        channels: stored channels of each clip, 1 or 3 (B); a grey clip beside colour ones has three equal channels.
        damaged_keys: keys of damaged segments that other clips of this batch replace.
        prompt_frame: the frame of the clip that is prompted first, the same for the whole batch.
    """

    frames: Tensor
    bits: Tensor
    objects: tuple[int, ...]
    sizes: Tensor
    object_to_clip: Tensor
    seeds: Tensor
    step: int
    names: tuple[str, ...]
    keys: tuple[str, ...]
    datasets: tuple[str, ...]
    modalities: tuple[str, ...]
    channels: tuple[int, ...]
    damaged_keys: tuple[str, ...] = ()
    prompt_frame: int = 0

    @property
    def num_objects(self) -> int:
        return sum(self.objects)

    @property
    def masks(self) -> Tensor:
        """bool [N, T, H, W], unpacked at each access."""
        return torch.cat([self.masks_of(clip).unpack() for clip in range(len(self.objects))])

    def masks_of(self, clip: int) -> PackedMasks:
        """Return the masks of one clip, on the padded grid."""
        first = sum(num_planes(count) for count in self.objects[:clip])
        count = self.objects[clip]
        return PackedMasks(self.bits[first : first + num_planes(count)], count)

    @property
    def object_seeds(self) -> Tensor:
        """int64 [N]: one seed per object, which depends only on its clip's seed and its index in the clip."""
        first = torch.searchsorted(self.object_to_clip, self.object_to_clip)
        index = torch.arange(self.num_objects, device=self.object_to_clip.device) - first
        return self.seeds[self.object_to_clip] + 7919 * (index + 1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ClipBatch:
        """Copy frames and bits to a device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ClipBatch:
        """Copy frames and bits to pinned memory, so that copying them to a GPU does not block."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> ClipBatch:
        return replace(self, frames=move(self.frames), bits=move(self.bits))
