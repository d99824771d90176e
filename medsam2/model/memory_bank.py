"""The memory bank, and the policy that decides what is kept and what a frame attends to.

Legend: N objects, C hidden width, M memory width, h and w the embedding's sides (image side / 16).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base


class MemorySettings(BaseModel):
    """The policy of the memory bank.

    Attributes:
        policy: sam2 (the released rule), pruned (SurgSAM-2's efficient frame pruning) or self_sorting (MedSAM-2's
            confidence memory bank): see configs/memory/.
        pruned_frames: how many memories pruning drops once the bank is full.
        capacity: memories that self-sorting keeps for an object, and draws for a frame.
        confidence: self-sorting admits a tracked frame whose predicted IoU reaches this.
        seed: of the draws.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = "sam2"
    pruned_frames: int = Field(2, ge=0)
    capacity: int = Field(16, ge=1)
    confidence: float = Field(0.5, ge=0, le=1)
    seed: int = 0


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


@dataclass(frozen=True, kw_only=True)
class MemoryPolicy:
    """Decides what is kept and what a frame attends to; this one is SAM 2's own rule.

    All conditioning frames, the last `slots - 1` tracked frames, and up to `max_pointers` object pointers, in
    evaluation of past frames only (Ravi et al. 2024, arXiv 2408.00714, section 4, "memory bank"). Another policy is a
    subclass in one file of model/policies/ and one yaml in configs/memory/. `Predictor` gives every object a bank of
    its own (N = 1), so that what is decided for one does not depend on others.

    Attributes:
        looks_at_images: whether memories must carry `iou` and `image`, and `attend` is given the frame's embedding.
        in_clips: whether the clips of training follow it, whose objects share a bank (N > 1) and whose memories carry
            neither; False: they follow SAM 2's rule, and the policy counts where whole cases are predicted.
    """

    slots: int = 7
    max_pointers: int = 16
    looks_at_images: ClassVar[bool] = False
    in_clips: ClassVar[bool] = True

    @classmethod
    def for_network(cls, sam: SAM2Base, **settings: Any) -> Self:
        """The policy with the numbers of `sam`."""
        return cls(slots=sam.num_maskmem, max_pointers=sam.max_obj_ptrs_in_encoder, **settings)

    @property
    def horizon(self) -> int | None:
        """A tracked frame farther away than this is never attended to and may be forgotten.

        None: distance does not matter, `admit` keeps the bank small.
        """
        return max(self.max_pointers, self.slots)

    def admit(self, bank: MemoryBank, frame: int, memory: Memory, conditioning: bool) -> None:
        """Store what `frame` left behind, or do not."""
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
        """What `frame` attends to. image: [1, C, h, w] its embedding, if the policy looks at images."""
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
