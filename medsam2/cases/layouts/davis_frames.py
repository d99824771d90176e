"""DAVIS and EndoVis frames: `JPEGImages/CLIP/00000.jpg`, `Annotations/CLIP/00000.png`, optionally `meta.json`.

Masks are palette or grey pictures of label values, pictures in the colours of `labels.json` (EndoVis: a list of
`{"name": ..., "color": [r, g, b], "classid": 1}`), or a folder for each object with one binary picture a frame. Instead
of `Annotations` there may be a COCO `annotations.json` or `instances.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel, TypeAdapter

from medsam2.cases.assemble import assemble
from medsam2.cases.case import Case, CaseError, CaseRef, Label
from medsam2.cases.formats import coco
from medsam2.cases.formats.frames import check_equal_sizes, list_frames, read_frames, read_mask_frames, require_frames
from medsam2.cases.formats.picture import decode, decode_mask
from medsam2.cases.listing import as_structure, described_ref, folders_in, read_meta, with_stated_spacing
from medsam2.cases.raster import MaskRaster, Raster, explain, read_json
from medsam2.cases.values import as_labels, present_values

NAME = "davis_frames"
LOOKS_FOR = "JPEGImages/CLIP/*.jpg beside Annotations/CLIP/*.png or a COCO annotations.json"
RESOLUTIONS = ("480p", "Full-Resolution", "1080p")
COLOURS = "labels.json"
Colour = tuple[int, int, int]
COCO = ("annotations.json", "instances.json")
VOID = 255
"""DAVIS marks pixels that are not to be scored with 255; they count as background."""


def recognise(path: Path) -> bool:
    """Whether clips lie there: Pascal VOC has folders of these names too, with stills and XML in them."""
    images = path / "JPEGImages"
    annotated = (path / "Annotations").is_dir() or _coco(path) is not None
    return annotated and images.is_dir() and any(child.is_dir() for child in images.iterdir())


def find(path: Path) -> list[CaseRef]:
    meta = read_meta(path)
    if not meta.labels and (path / COLOURS).is_file():
        named = {entry.name: entry.classid for entry in _colour_entries(path / COLOURS) if entry.classid}
        meta = meta.model_copy(update={"labels": named})
    images, masks = path / "JPEGImages", path / "Annotations"
    level = next((r for r in RESOLUTIONS if (images / r).is_dir() and (masks / r).is_dir()), None)
    if level:
        images, masks = images / level, masks / level
    listed = None if (path / "Annotations").is_dir() else _coco(path)
    return [described_ref(path, clip.name, clip, (listed or masks / clip.name,), meta) for clip in folders_in(images)]


def _coco(path: Path) -> Path | None:
    return next((path / name for name in COCO if (path / name).is_file()), None)


def load(ref: CaseRef) -> Case:
    """All frames with their masks, matched by name.

    Raises:
        CaseError: no frames, or a frame without a mask (an unlabelled frame must not pass for an empty one).
    """
    frames = require_frames(ref.images[0])
    image = Raster(read_frames(frames), (1.0, 1.0, 1.0), ref.images[0], moving=True)
    if ref.masks[0].suffix == ".json":
        names = [path.name for path in frames]
        return clip_case(ref, image, [coco.read_masks(ref.masks[0], ref.case_id, names, image.array.shape[:3])])
    return clip_case(ref, image, masks_of_frames(ref, ref.masks[0], partial(matched, frames), read_coloured))


def masks_of_frames(
    ref: CaseRef,
    folder: Path,
    pick: Callable[[Path], list[Path]],
    read: Callable[[CaseRef, Path, list[Path]], MaskRaster],
) -> list[MaskRaster]:
    """The masks of frames: one of label values, or one an object where the folder holds folders.

    Args:
        pick: the mask files in a folder, one for every frame. read: the label values in these files.
    """
    if list_frames(folder):
        return [read(ref, folder, pick(folder))]
    objects = folders_in(folder)
    if not objects:
        raise CaseError(f"{folder}: holds no masks.")
    return [object_mask(ref, read_mask_frames(pick(child), child), child.name) for child in objects]


def object_mask(ref: CaseRef, mask: MaskRaster, name: str) -> MaskRaster:
    """A binary mask under the name of its folder or file; a number is looked up among the declared labels."""
    if name.isdecimal():
        declared = {values[0]: label for values, label in ref.labels}
        name = declared.get(int(name), f"object_{int(name)}")
    return as_structure(mask, name)


def clip_case(ref: CaseRef, image: Raster, masks: Sequence[MaskRaster]) -> Case:
    """The `Case` of a clip; time and pixel size as `meta.json` gives them, else as the image does."""
    image = with_stated_spacing(ref, replace(image, moving=True))
    for mask in masks:
        if mask.planes.shape[1:] != image.array.shape[:3]:
            raise CaseError(
                f"{mask.path}: masks of shape {mask.planes.shape[1:]} (frames, height, width) for an image of shape "
                f"{image.array.shape[:3]} ({image.path}); they must be equal."
            )
    return assemble(ref, image, [named_binary(ref, mask) for mask in masks])


def named_binary(ref: CaseRef, mask: MaskRaster) -> MaskRaster:
    """A mask of 0 and 255 alone under the one name that the data set declares, or "object" where it declares none."""
    if not mask.exact or mask.labels or mask.planes.max(initial=0) != VOID:
        return mask
    declared = {value for values, _ in ref.labels for value in values}
    if VOID in declared or len(ref.labels) > 1 or present_values(mask.planes[0]) != [VOID]:
        return mask
    return replace(mask, labels=(Label(VOID, ref.labels[0][1] if ref.labels else "object"),))


def without_void(ref: CaseRef, mask: MaskRaster) -> MaskRaster:
    """Pixels that are not to be scored are background, unless the data set gives their value a name."""
    if mask.planes.max(initial=0) < VOID or any(VOID in values for values, _ in ref.labels):
        return mask
    return replace(mask, planes=np.where(mask.planes == VOID, 0, mask.planes).astype(mask.planes.dtype))


def matched(frames: Sequence[Path], folder: Path) -> list[Path]:
    """The mask of every frame, by name."""
    masks = {path.stem: path for path in list_frames(folder)}
    missing = [path.name for path in frames if path.stem not in masks]
    if missing:
        raise CaseError(
            f"{folder}: {len(missing)} of {len(frames)} frames have no mask, first {missing[0]}; remove these "
            "frames, or add an empty mask where nothing is there."
        )
    return [masks[path.stem] for path in frames]


def read_coloured(ref: CaseRef, folder: Path, paths: list[Path]) -> MaskRaster:
    """Label values of mask frames: palettes, grey values, or the colours of the data set's `labels.json`."""
    coloured = in_table_colours(paths)
    if coloured is not None:
        return replace(coloured, path=folder)
    mask = read_mask_frames(paths, folder)
    # DAVIS writes palettes; in a grey picture 255 is what is white
    return without_void(ref, mask) if any(picture_mode(path) == "P" for path in paths) else mask


def in_table_colours(paths: list[Path]) -> MaskRaster | None:
    """Mask pictures in the colours of the data set's `labels.json`; None where none is, or there is no such file."""
    table = _table(paths[0].parent)
    if table is None or not any(picture_mode(path) in ("RGB", "RGBA") for path in paths):
        return None
    return MaskRaster(read_colour_masks(paths, _colours(table))[None], paths[0])


def _table(folder: Path) -> Path | None:
    return next((p / COLOURS for p in (folder, *folder.parents[:3]) if (p / COLOURS).is_file()), None)


def _colours(table: Path) -> dict[Colour, int]:
    return {(0, 0, 0): 0} | {entry.color: entry.classid for entry in _colour_entries(table)}


class _Entry(BaseModel):
    name: str
    color: Colour
    classid: int


def _colour_entries(path: Path) -> list[_Entry]:
    """EndoVis' labels.json."""
    with explain(path, "expected a list of name, color [r, g, b] and classid", "mend it"):
        return TypeAdapter(list[_Entry]).validate_python(read_json(path))


def picture_mode(path: Path) -> str:
    """How Pillow calls a picture's kind of pixels ("P", "L", "RGB" ...), from its header; "" where it is not one."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""  # whoever reads it says why


def read_colour_masks(paths: Sequence[Path], colours: Mapping[Colour, int]) -> np.ndarray:
    """[T, H, W] label values of mask frames in colours; frames that are grey already keep their values.

    Raises:
        CaseError: a colour that `colours` does not name, or masks of unequal size.
    """
    values = np.full(1 << 24, -1, np.int32)
    for (red, green, blue), value in colours.items():
        values[red << 16 | green << 8 | blue] = value
    masks: list[np.ndarray] = []
    for path in paths:
        if picture_mode(path) not in ("RGB", "RGBA"):
            masks.append(as_labels(decode_mask(path, len(paths)), path))
            continue
        red, green, blue = np.moveaxis(decode(path, len(paths)).astype(np.int32), -1, 0)
        codes = red << 16 | green << 8 | blue
        unknown = codes[values[codes] < 0]
        if unknown.size:
            code = int(unknown[0])
            raise CaseError(
                f"{path}: {unknown.size} pixels of colours that labels.json does not name, first "
                f"{[code >> 16, code >> 8 & 255, code & 255]}; add it, or save the masks without smoothing."
            )
        masks.append(as_labels(values[codes], path))
    check_equal_sizes(paths, masks)
    return np.stack(masks)
