"""DAVIS and EndoVis frames: `JPEGImages/CLIP/00000.jpg`, `Annotations/CLIP/00000.png`, optionally `meta.json`.

Masks are palette or grey pictures of label values, pictures in the colours of `labels.json` (EndoVis: a list of
`{"name": ..., "color": [r, g, b], "classid": 1}`), or a folder for each object with one binary picture a frame. Instead
of `Annotations` there may be a COCO `annotations.json` or `instances.json` (YouTube-VIS).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medsam2.cases.assemble import assemble
from medsam2.cases.case import Case, CaseError
from medsam2.cases.formats import coco
from medsam2.cases.formats.frames import list_frames, mask_of, read_frames
from medsam2.cases.formats.picture import decode, decode_mask
from medsam2.cases.layouts.manifest import has_manifest
from medsam2.cases.layouts.meta import VOID, described_ref, read_json, read_meta
from medsam2.cases.layouts.registry import CaseRef
from medsam2.cases.listing import with_stated_spacing
from medsam2.cases.raster import MaskRaster, Raster
from medsam2.cases.values import as_labels, present_values

NAME = "davis_frames"
LOOKS_FOR = "JPEGImages/CLIP/*.jpg beside Annotations/CLIP/*.png or a COCO annotations.json"
RESOLUTIONS = ("480p", "Full-Resolution", "1080p")
COLOURS = "labels.json"
Colour = tuple[int, int, int]
COCO = ("annotations.json", "instances.json")


def recognise(path: Path) -> bool:
    """Whether clips lie there: Pascal VOC has folders of these names too, with stills and XML in them."""
    images = path / "JPEGImages"
    if not images.is_dir() or has_manifest(path) or not any(child.is_dir() for child in images.iterdir()):
        return False
    return (path / "Annotations").is_dir() or _coco(path) is not None


def find(path: Path) -> list[CaseRef]:
    meta = read_meta(path)
    if not meta.labels and (path / COLOURS).is_file():
        named = {str(entry["name"]): value for value, entry in _colour_entries(path / COLOURS) if value}
        meta = meta.model_copy(update={"labels": named})
    images, masks = path / "JPEGImages", path / "Annotations"
    level = next((r for r in RESOLUTIONS if (images / r).is_dir() and (masks / r).is_dir()), None)
    if level:
        images, masks = images / level, masks / level
    clips = sorted(p for p in images.iterdir() if p.is_dir() and not p.name.startswith("."))
    listed = None if (path / "Annotations").is_dir() else _coco(path)
    return [described_ref(path, NAME, clip.name, clip, (listed or masks / clip.name,), meta) for clip in clips]


def _coco(path: Path) -> Path | None:
    return next((path / name for name in COCO if (path / name).is_file()), None)


def load(ref: CaseRef) -> Case:
    """All frames with their masks, matched by name.

    Raises:
        CaseError: no frames, or a frame without a mask (an unlabelled frame must not pass for an empty one).
    """
    frames = list_frames(ref.images[0])
    if not frames:
        raise CaseError(f"{ref.images[0]}: holds no frames.")
    image = Raster(read_frames(frames), (1.0, 1.0, 1.0), ref.images[0], moving=True)
    if ref.masks[0].suffix == ".json":
        count, height, width = image.array.shape[:3]
        names = [path.name for path in frames]
        return clip_case(ref, image, [coco.read_masks(ref.masks[0], ref.case_id, names, (count, height, width))])
    return clip_case(ref, image, masks_of_frames(ref, ref.masks[0], frames))


def masks_of_frames(ref: CaseRef, folder: Path, frames: Sequence[Path]) -> list[MaskRaster]:
    """The masks of frames, by name: one of label values, or one an object where the folder holds folders."""
    if list_frames(folder):
        return [_one_mask(ref, folder, _matched(folder, frames))]
    objects = [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    if not objects:
        raise CaseError(f"{folder}: holds no masks.")
    return [object_mask(ref, mask_of(_matched(child, frames), child), child.name) for child in objects]


def object_mask(ref: CaseRef, mask: MaskRaster, name: str) -> MaskRaster:
    """A binary mask under the name of its folder or file; a number is looked up among the declared labels."""
    if name.isdecimal():
        declared = {values[0]: label for values, label in ref.labels}
        name = declared.get(int(name), f"object_{int(name)}")
    planes = mask.planes if mask.lossy or mask.planes.dtype.kind == "f" else (mask.planes > 0).astype(np.uint8)
    return replace(mask, planes=planes, labels=((0, 1, name),))


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
    if mask.lossy or mask.labels or mask.planes.dtype.kind == "f" or mask.planes.max(initial=0) != VOID:
        return mask
    declared = {value for values, _ in ref.labels for value in values}
    if VOID in declared or len(ref.labels) > 1 or present_values(mask.planes[0]) != [VOID]:
        return mask
    return replace(mask, labels=((0, VOID, ref.labels[0][1] if ref.labels else "object"),))


def without_void(ref: CaseRef, mask: MaskRaster) -> MaskRaster:
    """Pixels that are not to be scored are background, unless the data set gives their value a name."""
    if mask.planes.max(initial=0) < VOID or any(VOID in values for values, _ in ref.labels):
        return mask
    return replace(mask, planes=np.where(mask.planes == VOID, 0, mask.planes).astype(mask.planes.dtype))


def _matched(folder: Path, frames: Sequence[Path]) -> list[Path]:
    """The mask of every frame."""
    masks = {path.stem: path for path in list_frames(folder)}
    missing = [path.name for path in frames if path.stem not in masks]
    if missing:
        raise CaseError(
            f"{folder}: {len(missing)} of {len(frames)} frames have no mask, first {missing[0]}; remove these "
            "frames, or add an empty mask where nothing is there."
        )
    return [masks[path.stem] for path in frames]


def _one_mask(ref: CaseRef, folder: Path, paths: list[Path]) -> MaskRaster:
    modes = {picture_mode(path) for path in paths}
    table = _table(folder)
    if table is not None and modes & {"RGB", "RGBA"}:
        return MaskRaster(read_colour_masks(paths, _colours(table))[None], folder)
    mask = mask_of(paths, folder)
    # DAVIS writes palettes; in a grey picture 255 is what is white
    return without_void(ref, mask) if "P" in modes else mask


def in_table_colours(path: Path) -> MaskRaster | None:
    """A mask picture in the colours of the data set's `labels.json`; None where it is not, or there is no such file."""
    table = _table(path.parent)
    if table is None or picture_mode(path) not in ("RGB", "RGBA"):
        return None
    return MaskRaster(read_colour_masks([path], _colours(table))[None], path)


def _table(folder: Path) -> Path | None:
    return next((p / COLOURS for p in (folder, *folder.parents[:3]) if (p / COLOURS).is_file()), None)


def _colours(table: Path) -> dict[Colour, int]:
    colours: dict[Colour, int] = {(0, 0, 0): 0}
    for value, entry in _colour_entries(table):
        red, green, blue = (int(part) for part in entry["color"])
        colours[red, green, blue] = value
    return colours


def _colour_entries(path: Path) -> list[tuple[int, Any]]:
    """(value, entry) of EndoVis' labels.json, checked."""
    entries = read_json(path)
    try:
        found = [(int(entry["classid"]), entry) for entry in entries]
        if all(len(entry["color"]) == 3 and "name" in entry for _, entry in found):
            return found
    except (KeyError, TypeError, ValueError):
        pass
    raise CaseError(f"{path}: expected a list of name, color [r, g, b] and classid; mend it.")


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
    codes = np.array([(r << 16) | (g << 8) | b for r, g, b in colours], np.int64)
    order = np.argsort(codes)
    values = np.array(list(colours.values()), np.int64)[order]
    masks: list[np.ndarray] = []
    for path in paths:
        if picture_mode(path) not in ("RGB", "RGBA"):
            masks.append(as_labels(decode_mask(path, len(paths)), path))
        else:
            picture = decode(path, len(paths)).astype(np.int64)
            found = (picture[..., 0] << 16) | (picture[..., 1] << 8) | picture[..., 2]
            place = np.minimum(np.searchsorted(codes[order], found), codes.size - 1)
            unknown = found[codes[order][place] != found]
            if unknown.size:
                code = int(unknown[0])
                raise CaseError(
                    f"{path}: {unknown.size} pixels of colours that labels.json does not name, first "
                    f"{[code >> 16, code >> 8 & 255, code & 255]}; add it, or save the masks without smoothing."
                )
            masks.append(as_labels(values[place], path))
        if masks[-1].shape != masks[0].shape:
            raise CaseError(f"{path}: size {masks[-1].shape} differs from {masks[0].shape} of {paths[0].name}.")
    return np.stack(masks)
