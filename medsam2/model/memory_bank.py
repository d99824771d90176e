"""The memory bank, and the policy that decides which memories are stored and which a frame attends to.

Legend: N objects, C hidden width, M memory width, h and w sides of the embedding (image side / 16).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base


class MemorySettings(BaseModel):
    """Settings of the memory policy.

    Attributes:
        policy: sam2 (the released rule), pruned (SurgSAM-2's efficient frame pruning) or self_sorting (MedSAM-2's
            confidence memory bank): see configs/memory/.
        pruned_frames: number of memories that pruning drops once the bank is full.
        capacity: number of memories that self-sorting stores per object, and samples per frame.
        confidence: minimum predicted IoU at which self-sorting stores a tracked frame.
        seed: random seed of self-sorting.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = "sam2"
    pruned_frames: int = Field(2, ge=0)
    capacity: int = Field(16, ge=1)
    confidence: float = Field(0.5, ge=0, le=1)
    seed: int = 0


@dataclass(frozen=True)
class Memory:
    """Memory of one frame: spatial features [N, M, h, w] and object pointers [N, C].

    Attributes:
        iou: [N] predicted IoU of the frame's masks. image: [1, C, h, w] embedding of the frame. Both are None unless
            the policy needs them (`MemoryPolicy.looks_at_images`).
    """

    features: Tensor
    pointer: Tensor
    iou: Tensor | None = None
    image: Tensor | None = None


@dataclass
class MemoryBank:
    """Memories by frame index, of conditioning (prompted) frames and of tracked frames."""

    conditioning: dict[int, Memory] = field(default_factory=dict)
    tracked: dict[int, Memory] = field(default_factory=dict)

    def add(self, frame: int, memory: Memory, conditioning: bool) -> None:
        """Store the memory of `frame`; a frame is either conditioning or tracked, never both."""
        (self.tracked if conditioning else self.conditioning).pop(frame, None)
        (self.conditioning if conditioning else self.tracked)[frame] = memory

    def forget(self, frame: int) -> None:
        """Drop a tracked frame that no later frame can attend to, so that memory stays bounded."""
        self.tracked.pop(frame, None)


@dataclass(frozen=True)
class Attended:
    """Memories and pointers that one frame attends to.

    Attributes:
        spatial: (row of the temporal encoding, or None for no encoding; memory) pairs in attention order.
        pointers: (signed distance in frames, pointer [N, C]) pairs in attention order.
        pointer_span: distance in frames at which the pointers' temporal encoding is 1.
    """

    spatial: tuple[tuple[int | None, Memory], ...]
    pointers: tuple[tuple[int, Tensor], ...]
    pointer_span: int


@dataclass(frozen=True, kw_only=True)
class MemoryPolicy:
    """Decides which memories are stored and which a frame attends to. This base class is SAM 2's rule.

    A frame attends to all conditioning frames, the last `slots - 1` tracked frames, and up to `max_pointers` object
    pointers; in evaluation, to pointers of past frames only (Ravi et al. 2024, arXiv 2408.00714, section 4, "memory
    bank"). To add a policy, write a subclass in one file of model/policies/ and one yaml in configs/memory/.
    `Predictor` gives every object a separate bank (N = 1), so that decisions for one object do not depend on others.

    Attributes:
        looks_at_images: whether memories must have `iou` and `image`, and `attend` receives the frame's embedding.
        in_clips: whether training clips use the policy, where objects share a bank (N > 1) and memories have neither
            `iou` nor `image`. If False, clips use SAM 2's rule, and only predictions of whole cases use the policy.
    """

    slots: int = 7
    max_pointers: int = 16
    looks_at_images: ClassVar[bool] = False
    in_clips: ClassVar[bool] = True

    @classmethod
    def for_network(cls, sam: SAM2Base, **settings: Any) -> Self:
        """Return the policy with the memory sizes of `sam`."""
        return cls(slots=sam.num_maskmem, max_pointers=sam.max_obj_ptrs_in_encoder, **settings)

    @property
    def horizon(self) -> int | None:
        """Distance in frames beyond which a tracked frame is never attended to and can be dropped.

        None if distance does not matter and `admit` limits the size of the bank.
        """
        return max(self.max_pointers, self.slots)

    def admit(self, bank: MemoryBank, frame: int, memory: Memory, conditioning: bool) -> None:
        """Store the memory of `frame`; a policy may also discard it or replace another one."""
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
        """Return what `frame` attends to; `image` is its embedding [1, C, h, w] if the policy needs images."""
        sign = -1 if reverse else 1
        spatial: list[tuple[int | None, Memory]] = [(self.slots - 1, memory) for memory in bank.conditioning.values()]
        for distance in range(self.slots - 1, 0, -1):
            memory = bank.tracked.get(frame - sign * distance)
            if memory is not None:
                spatial.append((distance - 1, memory))
        span = min(num_frames, self.max_pointers)
        distances = [((frame - t) * sign, memory.pointer) for t, memory in bank.conditioning.items()]
        pointers = [(distance, pointer) for distance, pointer in distances if training or distance >= 0]
        for distance in range(1, span):
            memory = bank.tracked.get(frame - sign * distance)
            if memory is not None:
                pointers.append((distance, memory.pointer))
        return Attended(tuple(spatial), tuple(pointers), max(span - 1, 1))
