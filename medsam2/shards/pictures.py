"""Thumbnails with outlines: which segments are shown, the one frame that is decoded of each, and the JPEG of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medsam2.errors import UserError
from medsam2.shards.index import IndexRow, SegmentIndex
from medsam2.shards.record import CorruptFrameError, decode_frame, decode_mask

SIDE = 320  # pixels
OUTLINE = 2  # pixels
QUALITY = 88
COLOURS = ((255, 80, 80), (80, 220, 100), (90, 150, 255), (255, 210, 60), (230, 110, 240), (80, 230, 230))
NAMED = 6  # structures in a caption


@dataclass(frozen=True)
class Picture:
    """A thumbnail as base64 JPEG. names: (structure, css colour of its outline)."""

    data: str
    text: str
    names: tuple[tuple[str, str], ...] = ()
    more: int = 0


def spread(groups: Sequence[Hashable], most: int) -> list[int]:
    """At most `most` places in `groups`, as even over the groups as their sizes allow, and evenly within each."""
    places: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    chosen: list[int] = []
    left = most
    # the smallest first: what they cannot use is shared among the others
    for number, members in enumerate(sorted(places.values(), key=len)):
        count = min(len(members), -(-left // (len(places) - number)))
        chosen += [members[i] for i in evenly(len(members), count)]
        left -= count
    return sorted(chosen)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`: the middles of equal parts."""
    most = min(count, most)
    return [int((i + 0.5) * count / most) for i in range(most)]


def segment_picture(index: SegmentIndex, number: int) -> Picture:
    """The frame of segment `number` that shows most of its objects: small ones count as much as large ones.

    Raises:
        UserError: the shard is missing, cut short or damaged.
    """
    row = index.row(number)
    shown = [np.asarray(o.pixels) / max(1, *o.pixels) for o in row.objects]
    frame = int(np.argmax(np.sum(shown, axis=0))) if shown else 0
    image, planes = load_frame(index, row, frame)
    text = f"{row.dataset} {row.split}, {row.modality}, case {row.case}, frame {row.frames[frame]}"
    return labelled_picture(image, planes, {(o.plane, o.value): o.name for o in row.objects}, text)


def load_frame(index: SegmentIndex, row: IndexRow, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """One frame of a segment, uint8 [H, W(, 3)], and its label planes [P, H, W]; nothing else is read.

    Raises:
        UserError: the shard is missing, cut short or damaged.
    """
    path = index.folder / row.shard
    try:
        with open(path, "rb") as file:
            file.seek(row.frame_offset[frame])
            content = file.read(row.frame_length[frame])
            file.seek(row.mask_offset[frame])
            mask = file.read(row.mask_length[frame])
        image = decode_frame(content, row.codec, row.frame_shape)
        return image, decode_mask(mask, row.mask_codec, row.mask_shape, row.mask_dtype)
    except (OSError, CorruptFrameError) as error:
        raise UserError(f"{path}: frame {frame} of {row.key} cannot be read ({error}); prepare again.") from None


def labelled_picture(image: np.ndarray, planes: np.ndarray, names: dict[tuple[int, int], str], text: str) -> Picture:
    """A frame uint8 [H, W(, 3)] with planes [P, H, W]. names: by (plane, value); other values are drawn unnamed."""
    found = [(p, int(v)) for p, plane in enumerate(planes) for v in np.unique(plane[plane > 0])]
    titles = {key: names.get(key, f"value {key[1]}") for key in found}
    colours = dict(zip(dict.fromkeys(titles.values()), _cycle(len(set(titles.values()))), strict=True))
    return Picture(
        thumbnail(image, [(planes[p] == v, colours[titles[p, v]]) for p, v in found]), text, *_legend(colours)
    )


def thumbnail(image: np.ndarray, outlines: Iterable[tuple[np.ndarray, tuple[int, int, int]]]) -> str:
    """A frame uint8 [H, W(, 3)], at most 320 px a side, with the outlines of masks bool [H, W]; base64 JPEG."""
    from PIL import Image
    from scipy.ndimage import binary_erosion

    factor = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    picture = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("RGB").resize(size))
    for mask, colour in outlines:
        small = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        picture[small & ~binary_erosion(small, iterations=OUTLINE)] = colour
    buffer = io.BytesIO()
    # without chroma subsampling, which would wash out outlines of one pixel
    Image.fromarray(picture).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode()


def _cycle(count: int) -> list[tuple[int, int, int]]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _legend(colours: dict[str, tuple[int, int, int]]) -> tuple[tuple[tuple[str, str], ...], int]:
    named = tuple((name, "rgb({},{},{})".format(*colour)) for name, colour in list(colours.items())[:NAMED])
    return named, max(0, len(colours) - NAMED)
