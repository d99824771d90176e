"""`ClipBatch`: what the datamodule hands to the device, and the step of the plan that made it.

Legend: B clips, T frames, C channels, H and W pixels, N objects over all clips of the batch, K planes of bits. Of one
clip: n objects, G planes of eight objects, P label planes of a frame.
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
    """Masks of a clip's n objects as bits: an eighth of the memory to write, to send between processes and to a device.

    bits: uint8 [G, T, H, W]; bit b of plane g is the mask of object 8 g + b. count: n.
    """

    bits: Tensor
    count: int

    def object(self, index: int) -> Tensor:
        """bool [T, H, W]: the mask of one object."""
        return (self.bits[index // OBJECTS_PER_PLANE] & (1 << index % OBJECTS_PER_PLANE)) != 0

    def unpack(self) -> Tensor:
        """bool [n, T, H, W]."""
        return torch.stack([self.object(index) for index in range(self.count)])

    def present(self, frame: int) -> Tensor:
        """bool [n]: which objects have a pixel on a frame."""
        on_frame = PackedMasks(self.bits[:, frame : frame + 1], self.count)
        return torch.stack([on_frame.object(index).any() for index in range(self.count)])


def num_planes(count: int) -> int:
    """G for n objects."""
    return -(-count // OBJECTS_PER_PLANE)


def pack_labels(planes: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Label planes [P, H, W] to uint8 [H, W], whose bit b says where plane and value are those of pair b."""
    bits = np.zeros(planes.shape[1:], np.uint8)
    for bit, (plane, value) in enumerate(pairs):
        # a Python number keeps the comparison in the planes' own type, eight times faster
        bits |= (planes[plane] == value).view(np.uint8) << np.uint8(bit)
    return bits


@dataclass(frozen=True)
class ClipBatch:
    """A batch of clips with their objects. Frames and bits go to the device; what is small stays on the host.

    Attributes:
        frames: uint8 [B, T, C, H, W], C = 1 while all clips are grey, else 3; zero-padded right and below. Colours
            lie interleaved in memory, as they are stored: [B, T, H, W, 3] seen through a permutation.
        bits: uint8 [K, T, H, W] on the same grid: the masks of each clip's objects, eight to a plane (`PackedMasks`).
        objects: how many objects each clip has (B).
        sizes: int64 [B, 2], the valid (height, width) of each clip inside the padded frame.
        object_to_clip: int64 [N], the clip of each object, ascending.
        seeds: int64 [B], the plan's seed of each clip; all randomness of a clip derives from it.
        step: the global step of the plan; what a whole batch shares is drawn from (seed, step).
        names: the structure's name of each object (N). keys, datasets, modalities: one a clip (B).
        channels: 1 or 3 for each clip as it is stored (B); a grey clip beside colour ones has three equal channels.
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
        """bool [N, T, H, W], made when asked for."""
        return torch.cat([self.masks_of(clip).unpack() for clip in range(len(self.objects))])

    def masks_of(self, clip: int) -> PackedMasks:
        """The objects of one clip, on the padded grid."""
        first = sum(num_planes(count) for count in self.objects[:clip])
        count = self.objects[clip]
        return PackedMasks(self.bits[first : first + num_planes(count)], count)

    @property
    def object_seeds(self) -> Tensor:
        """int64 [N]: one seed an object, a function of its clip's seed and its place in the clip alone."""
        first = torch.searchsorted(self.object_to_clip, self.object_to_clip)
        place = torch.arange(self.num_objects, device=self.object_to_clip.device) - first
        return self.seeds[self.object_to_clip] + 7919 * (place + 1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ClipBatch:
        """Frames and bits on a device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ClipBatch:
        """Frames and bits in pinned memory, so that copying them to a GPU does not wait."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> ClipBatch:
        return replace(self, frames=move(self.frames), bits=move(self.bits))
