"""Pictures of augmented clips as the network receives them, with outlines and names of the objects.

Legend: T frames, N objects, S the model's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from PIL import Image

from medsam2.data.augment.augment import Augment, AugmentedBatch
from medsam2.data.plan.plan import STILLS, Plan
from medsam2.data.read.reader import StepDataset
from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD
from medsam2.reporting.overlays import Frame, Outline, Strip, draw_sheet
from medsam2.reporting.style import OBJECTS

FRAME_SIDE = 160  # pixels of a drawn frame
CLIPS_PER_ROW = 4


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of a clip that are drawn.

    Attributes:
        frames: uint8 [K, S, S, 3]. masks: bool [N, K, S, S]. names: of the objects. key: of the segment.
    """

    frames: np.ndarray
    masks: np.ndarray
    names: tuple[str, ...]
    key: str


def modality_clips(plan: Plan, augment: Augment, modality: str) -> Iterator[Clip]:
    """Yield the augmented training clips (and stills) of one modality of a plan, endlessly.

    `data.mixture` is ignored, since its patterns may be about other modalities.
    """
    data = plan.settings
    kinds = {kind for kind, stream in plan.streams.items() if any(s.modality == modality for s in stream.sources)}
    share = data.stills.share if len(kinds) == 2 else float(STILLS in kinds)
    changes = {"modalities": (modality,), "mixture": {}, "stills": data.stills.model_copy(update={"share": share})}
    steps = StepDataset(Plan(plan.catalogs, data.model_copy(update=changes), plan.seed, plan.global_batch))
    for step in count():
        yield from clips_of(augment(steps[step]))


def clips_of(batch: AugmentedBatch) -> list[Clip]:
    """Return the first, middle and last frame of each clip of a batch on the CPU (one frame of a still)."""
    length = batch.frames.shape[1]
    frame_indices = sorted({0, length // 2, length - 1})
    values = batch.frames[:, frame_indices].permute(0, 1, 3, 4, 2).numpy() * IMAGENET_STD + IMAGENET_MEAN
    images = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
    masks = batch.masks[:, frame_indices].numpy()
    clips = []
    for clip, (image, key) in enumerate(zip(images, batch.keys, strict=True)):
        objects = (batch.object_to_clip == clip).nonzero()[:, 0].tolist()
        clips.append(Clip(image, masks[objects], tuple(batch.names[index] for index in objects), key))
    return clips


def sheet(clips: Sequence[Clip], title: str) -> Image.Image:
    """Draw all clips on one picture, four per row; a structure has the same colour in all of them."""
    names = list(dict.fromkeys(name for clip in clips for name in clip.names))
    colours = {name: OBJECTS[index % len(OBJECTS)] for index, name in enumerate(names)}
    rows = [clips[start : start + CLIPS_PER_ROW] for start in range(0, len(clips), CLIPS_PER_ROW)]
    strips = [Strip(tuple(frame for clip in row for frame in _frames(clip, colours))) for row in rows]
    return draw_sheet(strips, title, legend=tuple(colours.items()), side=FRAME_SIDE)


def _frames(clip: Clip, colours: dict[str, str]) -> list[Frame]:
    titles = [clip.key, ", ".join(clip.names)]
    return [
        Frame(
            image,
            tuple(Outline(mask[index], colours[name]) for mask, name in zip(clip.masks, clip.names, strict=True)),
            title=titles[index] if index < len(titles) else "",
        )
        for index, image in enumerate(clip.frames)
    ]
