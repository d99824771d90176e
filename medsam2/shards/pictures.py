"""Thumbnails with outlines: which segments are shown, and the one frame that is decoded of each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from medsam2.errors import UserError
from medsam2.reporting.overlays import Frame, Outline, draw_frame, encode
from medsam2.reporting.page import Picture
from medsam2.reporting.style import OBJECTS
from medsam2.shards.index import IndexRow, SegmentIndex
from medsam2.shards.record import CorruptFrameError, decode_frame, decode_mask

THUMBNAIL_SIDE = 320  # pixels
MAX_NAMES = 6  # structures in a caption


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
        chosen += [members[int((i + 0.5) * len(members) / count)] for i in range(count)]
        left -= count
    return sorted(chosen)


def segment_picture(index: SegmentIndex, number: int) -> Picture:
    """The frame of segment `number` that shows most of its objects: small ones count as much as large ones.

    Raises:
        UserError: the shard is missing, cut short or damaged.
    """
    row = index.row(number)
    visible = [np.asarray(o.pixels) / max(1, *o.pixels) for o in row.objects]
    frame = int(np.argmax(np.sum(visible, axis=0))) if visible else 0
    image, planes = load_frame(index, row, frame)
    text = f"{row.dataset} {row.split}, {row.modality}, case {row.case}, frame {row.frames[frame]}"
    return labelled_picture(image, planes, {(o.plane, o.value): o.name for o in row.objects}, text)


def load_frame(index: SegmentIndex, row: IndexRow, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """One frame of a segment, uint8 [H, W(, 3)], and its label planes [P, H, W]; nothing else is read.

    Raises:
        UserError: the shard is missing, cut short or damaged, or its name leads out of the folder.
    """
    path = index.folder / row.shard
    try:
        if path.parent != index.folder:
            raise OSError("the index names a file outside of its folder")
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
    values = [(p, int(v)) for p, plane in enumerate(planes) for v in np.unique(plane[plane > 0])]
    titles = {key: names.get(key, f"value {key[1]}") for key in values}
    colours = {title: OBJECTS[i % len(OBJECTS)] for i, title in enumerate(dict.fromkeys(titles.values()))}
    outlines = tuple(Outline(planes[p] == v, colours[titles[p, v]]) for p, v in values)
    more = f"and {len(colours) - MAX_NAMES} more; " if len(colours) > MAX_NAMES else ""
    content = encode(draw_frame(Frame(image, outlines), THUMBNAIL_SIDE))
    return Picture(content, more + text, colours=tuple(colours.items())[:MAX_NAMES], alt=text)
