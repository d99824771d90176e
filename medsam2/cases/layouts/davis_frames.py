"""DAVIS and EndoVis frames: `JPEGImages/CLIP/00000.jpg`, `Annotations/CLIP/00000.png`, optionally `meta.json`.

Masks are palette or grey images of label values, images in the colours of `labels.json` (EndoVis: a list of
`{"name": ..., "color": [r, g, b], "classid": 1}`), or one folder per object with a binary image per frame. A COCO
`annotations.json` or `instances.json` may replace `Annotations`.
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
from medsam2.cases.listing import apply_listed_spacing, as_structure, list_folders, read_meta, ref_from_meta
from medsam2.cases.raster import MaskRaster, Raster, explain, read_json
from medsam2.cases.values import as_labels, present_values

NAME = "davis_frames"
LOOKS_FOR = "JPEGImages/CLIP/*.jpg beside Annotations/CLIP/*.png or a COCO annotations.json"
RESOLUTIONS = ("480p", "Full-Resolution", "1080p")
COLOUR_FILE = "labels.json"
Colour = tuple[int, int, int]
COCO_FILES = ("annotations.json", "instances.json")
VOID = 255
"""DAVIS marks pixels that must not be scored with 255; they become background."""


def recognise(path: Path) -> bool:
    """Whether the folder holds clips; Pascal VOC has folders of the same names, with stills and XML files."""
    images = path / "JPEGImages"
    annotated = (path / "Annotations").is_dir() or _find_coco(path) is not None
    return annotated and images.is_dir() and any(child.is_dir() for child in images.iterdir())


def find(path: Path) -> list[CaseRef]:
    meta = read_meta(path)
    if not meta.labels and (path / COLOUR_FILE).is_file():
        named = {entry.name: entry.classid for entry in _colour_entries(path / COLOUR_FILE) if entry.classid}
        meta = meta.model_copy(update={"labels": named})
    images, masks = path / "JPEGImages", path / "Annotations"
    level = next((r for r in RESOLUTIONS if (images / r).is_dir() and (masks / r).is_dir()), None)
    if level:
        images, masks = images / level, masks / level
    coco_file = None if (path / "Annotations").is_dir() else _find_coco(path)
    return [
        ref_from_meta(path, clip.name, clip, (coco_file or masks / clip.name,), meta) for clip in list_folders(images)
    ]


def _find_coco(path: Path) -> Path | None:
    return next((path / name for name in COCO_FILES if (path / name).is_file()), None)


def load(ref: CaseRef) -> Case:
    """Load all frames with their masks, matched by name.

    Raises:
        CaseError: there are no frames, or a frame has no mask (an unlabelled frame must not count as empty).
    """
    frames = require_frames(ref.images[0])
    image = Raster(read_frames(frames), (1.0, 1.0, 1.0), ref.images[0], moving=True)
    if ref.masks[0].suffix == ".json":
        names = [path.name for path in frames]
        return assemble_clip(ref, image, [coco.read_masks(ref.masks[0], ref.case_id, names, image.array.shape[:3])])
    return assemble_clip(
        ref, image, read_frame_masks(ref, ref.masks[0], partial(match_masks, frames), read_label_frames)
    )


def read_frame_masks(
    ref: CaseRef,
    folder: Path,
    pick: Callable[[Path], list[Path]],
    read: Callable[[CaseRef, Path, list[Path]], MaskRaster],
) -> list[MaskRaster]:
    """Read the masks of a clip: one mask of label values, or one mask per subfolder, each an object.

    Args:
        pick: returns the mask files in a folder, one per frame. read: returns the label values in these files.
    """
    if list_frames(folder):
        return [read(ref, folder, pick(folder))]
    objects = list_folders(folder)
    if not objects:
        raise CaseError(f"{folder}: the folder has no masks.")
    return [name_object(ref, read_mask_frames(pick(child), child), child.name) for child in objects]


def name_object(ref: CaseRef, mask: MaskRaster, name: str) -> MaskRaster:
    """Name a binary mask after its folder or file; a number is looked up in the declared labels."""
    if name.isdecimal():
        declared = {values[0]: label for values, label in ref.labels}
        name = declared.get(int(name), f"object_{int(name)}")
    return as_structure(mask, name)


def assemble_clip(ref: CaseRef, image: Raster, masks: Sequence[MaskRaster]) -> Case:
    """Assemble the case of a clip; frame rate and pixel size in `meta.json` override those of the image."""
    image = apply_listed_spacing(ref, replace(image, moving=True))
    for mask in masks:
        if mask.planes.shape[1:] != image.array.shape[:3]:
            raise CaseError(
                f"{mask.path}: masks of shape {mask.planes.shape[1:]} (frames, height, width) for an image of shape "
                f"{image.array.shape[:3]} ({image.path}); they must be equal."
            )
    return assemble(ref, image, [name_binary_mask(ref, mask) for mask in masks])


def name_binary_mask(ref: CaseRef, mask: MaskRaster) -> MaskRaster:
    """Name a mask with only 0 and 255 after the single declared label, or "object" if none is declared."""
    if not mask.exact or mask.labels or mask.planes.max(initial=0) != VOID:
        return mask
    declared = {value for values, _ in ref.labels for value in values}
    if VOID in declared or len(ref.labels) > 1 or present_values(mask.planes[0]) != [VOID]:
        return mask
    return replace(mask, labels=(Label(VOID, ref.labels[0][1] if ref.labels else "object"),))


def clear_void(ref: CaseRef, mask: MaskRaster) -> MaskRaster:
    """Set pixels that must not be scored to background, unless the dataset names their value."""
    if mask.planes.max(initial=0) < VOID or any(VOID in values for values, _ in ref.labels):
        return mask
    return replace(mask, planes=np.where(mask.planes == VOID, 0, mask.planes).astype(mask.planes.dtype))


def match_masks(frames: Sequence[Path], folder: Path) -> list[Path]:
    """Return the mask file of every frame, matched by name."""
    masks = {path.stem: path for path in list_frames(folder)}
    missing = [path.name for path in frames if path.stem not in masks]
    if missing:
        raise CaseError(
            f"{folder}: {len(missing)} of {len(frames)} frames have no mask, first {missing[0]}; remove these "
            "frames, or add an empty mask for a frame without objects."
        )
    return [masks[path.stem] for path in frames]


def read_label_frames(ref: CaseRef, folder: Path, paths: list[Path]) -> MaskRaster:
    """Read label values of mask frames: palettes, grey values, or the colours in the dataset's `labels.json`."""
    colour_mask = read_by_colour_table(paths)
    if colour_mask is not None:
        return replace(colour_mask, path=folder)
    mask = read_mask_frames(paths, folder)
    # only palettes use 255 as void, since DAVIS writes palettes; in a grey image 255 is a label
    return clear_void(ref, mask) if any(picture_mode(path) == "P" for path in paths) else mask


def read_by_colour_table(paths: list[Path]) -> MaskRaster | None:
    """Read masks in the colours of the dataset's `labels.json`; None without coloured masks or without the file."""
    folder = paths[0].parent
    table = next((p / COLOUR_FILE for p in (folder, *folder.parents[:3]) if (p / COLOUR_FILE).is_file()), None)
    if table is None or not any(picture_mode(path) in ("RGB", "RGBA") for path in paths):
        return None
    colours = {(0, 0, 0): 0} | {entry.color: entry.classid for entry in _colour_entries(table)}
    return MaskRaster(_read_colours(paths, colours)[None], paths[0])


class _ColourEntry(BaseModel):
    name: str
    color: Colour
    classid: int


def _colour_entries(path: Path) -> list[_ColourEntry]:
    """Read EndoVis' labels.json."""
    with explain(path, "expected a list of name, color [r, g, b] and classid", "correct it"):
        return TypeAdapter(list[_ColourEntry]).validate_python(read_json(path))


def picture_mode(path: Path) -> str:
    """Return Pillow's mode of an image ("P", "L", "RGB" ...) from its header; "" if the file is not an image."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""  # reading the file raises the error for the user


def _read_colours(paths: Sequence[Path], colours: Mapping[Colour, int]) -> np.ndarray:
    """Read label values [T, H, W] of coloured mask frames; grey frames keep their values.

    Raises:
        CaseError: `colours` lacks a colour, or masks have different sizes.
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
                f"{path}: {unknown.size} pixels have colours that labels.json does not list, first "
                f"{[code >> 16, code >> 8 & 255, code & 255]}; add the colour, or save the masks without smoothing."
            )
        masks.append(as_labels(values[codes], path))
    check_equal_sizes(paths, masks)
    return np.stack(masks)
