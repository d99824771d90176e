"""The memory bank, and the policy that decides what is kept and what a frame attends to.

Legend: N objects, C hidden width, M memory width, h and w the embedding's sides (image side / 16).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base


@dataclass(frozen=True)
class Memory:
    """What one frame leaves behind: spatial features [N, M, h, w] and an object pointer [N, C].

    Attributes:
        iou: [N] predicted IoU of the remembered masks. image: [1, C, h, w] embedding of the frame. Both only where
            the policy says that it looks at them (`MemoryPolicy.looks_at_images`).
    """

    features: Tensor
    pointer: Tensor
    iou: Tensor | None = None
    image: Tensor | None = None


@dataclass
class MemoryBank:
    """Memories by frame index: of conditioning (prompted) frames, and of the frames tracked from them."""

    conditioning: dict[int, Memory] = field(default_factory=dict)
    tracked: dict[int, Memory] = field(default_factory=dict)

    def add(self, frame: int, memory: Memory, conditioning: bool) -> None:
        """Store the memory of `frame`; a frame is either conditioning or tracked, never both."""
        (self.tracked if conditioning else self.conditioning).pop(frame, None)
        (self.conditioning if conditioning else self.tracked)[frame] = memory

    def forget(self, frames: list[int]) -> None:
        """Drop tracked frames that no later frame can attend to, so that memory stays bounded."""
        for frame in frames:
            self.tracked.pop(frame, None)


@dataclass(frozen=True)
class Attended:
    """What one frame attends to.

    Attributes:
        spatial: (row of the temporal encoding, or None for no such encoding; memory) pairs in attention order.
        pointers: (signed distance in frames, pointer [N, C]) pairs in attention order.
        pointer_span: the distance that scales the pointers' temporal encoding to 1.
    """

    spatial: tuple[tuple[int | None, Memory], ...]
    pointers: tuple[tuple[int, Tensor], ...]
    pointer_span: int


class MemoryPolicy(Protocol):
    """Decides what a frame attends to; a new policy is one file in model/policies/ and one yaml in configs/memory/.

    `Predictor` gives every object a bank of its own (N = 1), so that what is decided for one does not depend on others.
    """

    @property
    def horizon(self) -> int | None:
        """A tracked frame farther away than this is never attended to and may be forgotten.

        None: distance does not matter, `admit` keeps the bank small.
        """
        ...

    @property
    def looks_at_images(self) -> bool:
        """Whether memories must carry `iou` and `image`, and `attend` is given the frame's embedding."""
        ...

    def admit(self, bank: MemoryBank, frame: int, memory: Memory, conditioning: bool) -> None:
        """Store what `frame` left behind, or do not."""
        ...

    def attend(
        self,
        bank: MemoryBank,
        frame: int,
        reverse: bool,
        num_frames: int,
        training: bool,
        image: Tensor | None = None,
    ) -> Attended:
        """What `frame` attends to. image: [1, C, h, w] its embedding, if the policy looks at images."""
        ...


@dataclass(frozen=True)
class Sam2Policy:
    """SAM 2's own rule (Ravi et al. 2024, arXiv 2408.00714, section 4, "memory bank").

    All conditioning frames (or the `max_conditioning` closest), the last `slots - 1` tracked frames (every
    `stride`-th in evaluation), and up to `max_pointers` object pointers, in evaluation of past frames only.
    """

    slots: int = 7
    max_pointers: int = 16
    max_conditioning: int = -1
    stride: int = 1
    past_pointers_only: bool = True

    @property
    def horizon(self) -> int:
        return max(self.max_pointers, self.slots * self.stride)

    @property
    def looks_at_images(self) -> bool:
        return False

    def admit(self, bank: MemoryBank, frame: int, memory: Memory, conditioning: bool) -> None:
        bank.add(frame, memory, conditioning)

    def attend(
        self,
        bank: MemoryBank,
        frame: int,
        reverse: bool,
        num_frames: int,
        training: bool,
        image: Tensor | None = None,
    ) -> Attended:
        chosen, others = self._closest(bank.conditioning, frame)
        spatial: list[tuple[int | None, Memory]] = [(self.slots - 1, memory) for memory in chosen.values()]
        for distance in range(self.slots - 1, 0, -1):
            index = self._earlier(frame, distance, reverse, 1 if training else self.stride)
            memory = bank.tracked.get(index, others.get(index))
            if memory is not None:
                spatial.append((distance - 1, memory))
        span = min(num_frames, self.max_pointers)
        sign = -1 if reverse else 1
        pointers = [
            ((frame - t) * sign, memory.pointer)
            for t, memory in chosen.items()
            if training or not self.past_pointers_only or (t >= frame if reverse else t <= frame)
        ]
        for distance in range(1, span):
            index = frame - sign * distance
            if index < 0 or index >= num_frames:
                break
            memory = bank.tracked.get(index, others.get(index))
            if memory is not None:
                pointers.append((distance, memory.pointer))
        return Attended(tuple(spatial), tuple(pointers), max(span - 1, 1))

    def _closest(self, frames: dict[int, Memory], now: int) -> tuple[dict[int, Memory], dict[int, Memory]]:
        """Split conditioning frames into the `max_conditioning` closest and the rest (one on each side first)."""
        if self.max_conditioning < 0 or len(frames) <= self.max_conditioning:
            return frames, {}
        before = [max((t for t in frames if t < now), default=None), min((t for t in frames if t >= now), default=None)]
        keep = [t for t in before if t is not None]
        rest = sorted((t for t in frames if t not in keep), key=lambda t: abs(t - now))
        keep += rest[: self.max_conditioning - len(keep)]
        return {t: frames[t] for t in keep}, {t: m for t, m in frames.items() if t not in keep}

    @staticmethod
    def _earlier(frame: int, distance: int, reverse: bool, stride: int) -> int:
        """The frame `distance` places back: the neighbour, then every `stride`-th (Cheng & Schwing 2022, XMem)."""
        if distance == 1:
            return frame + 1 if reverse else frame - 1
        if reverse:
            return -(-(frame + 2) // stride) * stride + (distance - 2) * stride
        return ((frame - 2) // stride) * stride - (distance - 2) * stride


def sam2_policy(sam: SAM2Base) -> Sam2Policy:
    """SAM 2's rule with the numbers of `sam`."""
    return Sam2Policy(
        slots=sam.num_maskmem,
        max_pointers=sam.max_obj_ptrs_in_encoder,
        max_conditioning=sam.max_cond_frames_in_attn,
        stride=sam.memory_temporal_stride_for_eval,
        past_pointers_only=sam.only_obj_ptrs_in_the_past_for_eval,
    )
