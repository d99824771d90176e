"""Turns a protocol and the ground truth of an object into prompts.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.evaluation.settings import ProtocolSettings
from medsam2.inference.predictor import FramePrompt
from medsam2.model.provenance import Provenance
from medsam2.prompts.evaluation import NEGATIVE_RULES, PROMPT_RULES, ObjectTrack, ObjectView, mark_entries, pick_frames


class Scene:
    """All objects of a case, for prompts that depend on the other objects."""

    def __init__(self, case: LoadedCase) -> None:
        self.targets = tuple(
            Target(case.planes[label.plane], label.id, number, self) for number, label in enumerate(case.objects)
        )

    @cached_property
    def entries(self) -> np.ndarray:
        """bool [T], the frames on which any object comes into view."""
        return np.any([mark_entries(target.areas > 0) for target in self.targets], axis=0)


@dataclass(frozen=True, eq=False)
class Target:
    """The ground truth of one object: the pixels of a label plane with its value; masks are made frame by frame.

    Attributes:
        plane: integer or bool [T, H, W]. number: its index in the case. scene: all objects of the case, if known.
    """

    plane: np.ndarray
    value: int = 1
    number: int = 0
    scene: Scene | None = None

    def frame(self, frame: int) -> np.ndarray:
        """bool [H, W]."""
        return np.asarray(self.plane[frame] == self.value)

    def dense(self) -> np.ndarray:
        """bool [T, H, W]."""
        return np.asarray(self.plane == self.value)

    @cached_property
    def areas(self) -> np.ndarray:
        """int [T], its pixels on each frame."""
        return np.asarray([np.count_nonzero(self.frame(frame)) for frame in range(len(self.plane))])

    def object_track(self, step: int) -> ObjectTrack:
        """The frames that show the object, for the slice rules of `prompts.evaluation`."""
        scene = self.scene
        return ObjectTrack(self.areas, lambda: mark_entries(self.areas > 0) if scene is None else scene.entries, step)

    def others(self, frame: int) -> tuple[np.ndarray, ...]:
        """bool [H, W] of each other object that a frame shows."""
        every = () if self.scene is None else self.scene.targets
        masks = [other.frame(frame) for other in every if other.number != self.number]
        return tuple(mask for mask in masks if mask.any())


def apply(protocol: ProtocolSettings, target: Target) -> list[list[FramePrompt]]:
    """Make the prompts for one object from its ground truth: one list for each part that is predicted separately.

    Only prompt rules with `predict_separately` make several parts. `FramePrompt.object` is the number of the part.

    Raises:
        ValueError: the object is on no frame.
    """
    rule = PROMPT_RULES[protocol.prompt]
    parts: list[list[FramePrompt]] = []
    for frame in pick_frames(target.object_track(protocol.step), protocol.slices):
        needs_others = protocol.negatives > 0 and protocol.negatives_from == "others"
        others = target.others(frame) if needs_others else ()
        view = ObjectView(target.frame(frame), others, protocol.number, (protocol.seed, frame, target.number))
        negatives = NEGATIVE_RULES[protocol.negatives_from](view, protocol.negatives) if protocol.negatives else None
        for prompt in rule.make(view):
            if rule.predict_separately or not parts:
                parts.append([])
            if negatives is not None:
                prompt = prompt.with_negatives(negatives)
            parts[-1].append(FramePrompt(frame, len(parts) - 1, **vars(prompt)))
    return parts


def scored_frames(protocol: ProtocolSettings, areas: np.ndarray, prompted: tuple[int, ...]) -> np.ndarray:
    """The frames that are scored, in order; never empty: a clip of two frames has no inner ones, so both count.

    Args:
        areas: int [T], the object's pixels on each frame.
    """
    all_frames = np.arange(len(areas))
    if protocol.scored == "present":
        return np.flatnonzero(areas)
    if protocol.scored == "prompted":
        return np.asarray(prompted)
    if protocol.scored == "inner" and len(areas) > 2:
        return all_frames[1:-1]
    return all_frames


# ------------------------------------------------------------------------------- what a checkpoint was trained with


def why_outside(protocol: ProtocolSettings, provenance: Provenance) -> str:
    """Why a checkpoint was not trained with the protocol's prompts; empty if it was or if that is unknown.

    Args:
        provenance: of the checkpoint; training records its prompt settings there (`recipe.prompts`), Meta's checkpoints
            have none.
    """
    missing, trained = provenance.untrained([protocol.prompt], bool(protocol.corrections.most), protocol.negatives > 0)
    return f"{protocol.name} uses {missing}, but this checkpoint was trained with {trained}." if missing else ""
