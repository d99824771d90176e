"""Pictures of augmented clips as the network gets them, with the outlines of their objects and what they are.

Legend: B clips, T frames, N objects, S the model's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medsam2.data.augment import Augment, AugmentedBatch
from medsam2.data.loader import StepDataset
from medsam2.data.plan import STILLS, Plan
from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD
from medsam2.shards.pictures import COLOURS

TILE = 160  # pixels of a frame's side
GAP, SEAM = 6, 2  # pixels between clips, and between the frames of one
LINE, FONT = 14, 11  # pixels: height of a line of text, and of its letters
ACROSS = 4  # clips side by side
TEXT = (205, 205, 205)
Colour = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class ClipPicture:
    """One clip: shown frames uint8 RGB [K, TILE, TILE, 3] with outlines, what it is, and its objects' names."""

    frames: np.ndarray
    text: str
    names: tuple[tuple[str, Colour], ...]


def modality_clips(plan: Plan, augment: Augment, modality: str) -> Iterator[ClipPicture]:
    """The augmented training clips (and stills) of one modality of a plan, without end.

    The shares of `data.mixture` are left out: they may be about other modalities.
    """
    data = plan.settings
    kinds = {kind for kind, stream in plan.streams.items() if any(s.modality == modality for s in stream.sources)}
    share = data.stills.share if len(kinds) == 2 else float(STILLS in kinds)
    chosen = {"modalities": (modality,), "mixture": {}, "stills": data.stills.model_copy(update={"share": share})}
    steps = StepDataset(Plan(plan.catalogs, data.model_copy(update=chosen), plan.seed, plan.global_batch))
    for step in count():
        yield from clip_pictures(augment(steps[step]))


def clip_pictures(batch: AugmentedBatch) -> list[ClipPicture]:
    """First, middle and last frame of each clip of a batch on the CPU (one frame of a still)."""
    length = batch.frames.shape[1]
    shown = sorted({0, length // 2, length - 1})
    values = batch.frames[:, shown].permute(0, 1, 3, 4, 2).numpy() * IMAGENET_STD + IMAGENET_MEAN
    images = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
    owners = batch.object_to_clip.tolist()
    pictures = []
    for clip, (key, dataset) in enumerate(zip(batch.keys, batch.datasets, strict=True)):
        own = [which for which, owner in enumerate(owners) if owner == clip]
        colours = [COLOURS[place % len(COLOURS)] for place in range(len(own))]
        masks = batch.masks[own][:, shown].numpy()
        tiles = [_outlined(image, masks[:, place], colours) for place, image in enumerate(images[clip])]
        names = tuple((batch.names[which], colour) for which, colour in zip(own, colours, strict=True))
        pictures.append(ClipPicture(np.stack(tiles), key if key.startswith(dataset) else f"{dataset} {key}", names))
    return pictures


def _outlined(image: np.ndarray, masks: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """uint8 [S, S, 3] at TILE pixels with the outlines of masks bool [n, S, S]."""
    smaller = image.shape[0] > TILE
    how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    tile = cv2.resize(image, (TILE, TILE), interpolation=how)
    for mask, colour in zip(masks, colours, strict=True):
        shape = cv2.resize(mask.astype(np.float32), (TILE, TILE), interpolation=how)
        filled = (shape >= (0.25 if smaller else 0.5)).astype(np.uint8)  # thin structures are still shown when reduced
        inner = cv2.erode(filled, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
        tile[(filled > 0) & (inner == 0)] = colour
    return tile


def sheet(clips: Sequence[ClipPicture], title: str) -> Image.Image:
    """All clips on one picture, four side by side, under a title."""
    across = min(ACROSS, len(clips))
    wide = max(len(clip.frames) for clip in clips) * (TILE + SEAM)
    high = 2 * LINE + TILE
    top = LINE + 2 * GAP
    size = (across * (wide + GAP) + GAP, top + -(-len(clips) // across) * (high + GAP))
    picture = Image.new("RGB", size, (24, 24, 24))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    draw.text((GAP, GAP), title, TEXT, font)
    for number, clip in enumerate(clips):
        row, column = divmod(number, across)
        left, upper = GAP + column * (wide + GAP), top + row * (high + GAP)
        draw.text((left, upper), _shortened(draw, font, clip.text, wide), TEXT, font)
        _write_names(draw, font, clip.names, (left, upper + LINE), left + wide)
        for place, frame in enumerate(clip.frames):
            picture.paste(Image.fromarray(frame), (left + place * (TILE + SEAM), upper + 2 * LINE))
    return picture


def _shortened(draw: ImageDraw.ImageDraw, font: Font, text: str, wide: int) -> str:
    """The end of `text` that fits `wide` pixels: keys differ there."""
    if draw.textlength(text, font) <= wide:
        return text
    while text and draw.textlength(f"...{text}", font) > wide:
        text = text[1:]
    return f"...{text}"


def _write_names(
    draw: ImageDraw.ImageDraw,
    font: Font,
    names: Sequence[tuple[str, Colour]],
    start: tuple[int, int],
    end: int,
) -> None:
    """Names in their colours from `start` on; what does not fit before `end` is counted."""
    x, y = start
    for place, (name, colour) in enumerate(names):
        more = f"+{len(names) - place}"
        if x + draw.textlength(name, font) > end - draw.textlength(more, font):
            draw.text((x, y), more, TEXT, font)
            return
        draw.text((x, y), name, colour, font)
        x += int(draw.textlength(name, font)) + 2 * GAP
