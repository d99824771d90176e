"""Images beside masks, matched by name: two folders, or pairs in one.

    images/a.png   masks/a.png          also img, imgs, image, JPEGImages beside mask, label, labels, SegmentationClass;
    images/a.nii.gz   labels/a.nii.gz   masks may end in _mask, _seg, _label; a folder masks/a/ holds a file an object
    train/images/...  or  images/train/...   and the same for val and test: the split is kept
    a_image.nrrd beside a_label.nrrd, a.png beside a_mask.png, img2d.tif beside mask2d.tif

Every file or folder that some format reads is a case. Optionally `meta.json`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from medsam2.cases.assemble import assemble
from medsam2.cases.case import Case, CaseRef, Label
from medsam2.cases.formats.frames import list_frames
from medsam2.cases.formats.picture import ENDINGS as PICTURE_ENDINGS
from medsam2.cases.layouts import davis_frames
from medsam2.cases.listing import (
    SPLITS,
    apply_listed_spacing,
    list_folders,
    list_visible,
    read_meta,
    read_part,
    read_part_mask,
    ref_from_meta,
    stem,
)
from medsam2.cases.raster import MaskRaster, Raster
from medsam2.cases.values import present_values

NAME = "image_masks"
YIELDS_TO = ("davis_frames", "video_masks", "nnunet_raw", "msd", "monai_datalist")
LOOKS_FOR = "images/NAME.* beside masks/NAME.*, or NAME_image.* beside NAME_label.*"

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "segmentationclass", "annotations", "segmentations", "gt")
ENDINGS = (*PICTURE_ENDINGS, ".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm")

WORDS = "mask|masks|seg|label|labels|msk|segmentation|gt"
SUFFIX = re.compile(rf"(?P<base>.+?)[ _-](?:{WORDS})(?:[ _-]?\d+)?", re.IGNORECASE)
PREFIX = re.compile(r"(?:mask|label|seg)(?P<base>[ _-]?.+)", re.IGNORECASE)
BIDS = re.compile(r"_seg-(?P<seg>[^_]+)")
AFTER = ("", "_image", "_img", "_im", "_ct", "_mr", "_mri", "_pet", "_us")
BEFORE = ("img", "image", "im")


@dataclass(frozen=True)
class _Place:
    """Where images and masks lie; `split` as the folders say. One folder for both: `masks` is `images`."""

    images: Path
    masks: Path
    split: str = ""


def recognise(path: Path) -> bool:
    return path.is_dir() and any(masks for place in _places(path) for _, masks in _pairs(place))


def find(path: Path) -> list[CaseRef]:
    """One case an image; an image without mask, and a mask without image, are found too and fail when read."""
    meta = read_meta(path)
    found = [(place, *pair) for place in _places(path) for pair in _pairs(place)]
    often = Counter(stem(image) for _, image, _ in found)
    refs: list[CaseRef] = []
    for place, image, masks in found:
        if not masks and place.images == place.masks:
            continue  # one folder for all may hold other things
        name = stem(image)
        problem = ""
        if not masks:
            problem = f"{image}: no mask for it, expected {place.masks / name}.*; add one, empty if nothing is there."
        elif not image.exists():
            problem = f"{masks[0]}: no image for it, expected {image.with_suffix('')}.*; remove it or add the image."
        case = f"{place.split}_{name}" if often[name] > 1 and place.split else name
        ref = ref_from_meta(path, name, image, masks, meta, problem)
        refs.append(replace(ref, case_id=case, split=place.split))
    return refs


def load(ref: CaseRef) -> Case:
    """The image under its mask or masks."""
    image = apply_listed_spacing(ref, read_part(ref))
    return assemble(ref, image, (mask for path in ref.masks for mask in _read_masks(ref, path, image)))


def _read_masks(ref: CaseRef, path: Path, image: Raster) -> Iterator[MaskRaster]:
    if path.is_dir() and image.moving:
        pick = partial(davis_frames.matched, list_frames(ref.images[0]))
        for mask in davis_frames.masks_of_frames(ref, path, pick, davis_frames.read_coloured):
            yield davis_frames.named_binary(ref, mask)
    elif path.is_dir() and any(_known(child) for child in path.iterdir()):
        for child in filter(_known, list_visible(path)):
            yield davis_frames.object_mask(ref, read_part_mask(ref, child), stem(child))
    else:
        mask = davis_frames.named_binary(ref, _one_mask(ref, path))
        yield mask if len(ref.masks) == 1 else _told_apart(ref, mask)


def _one_mask(ref: CaseRef, path: Path) -> MaskRaster:
    is_picture = path.suffix.lower() in PICTURE_ENDINGS
    coloured = davis_frames.in_table_colours([path]) if is_picture else None
    if coloured is not None:
        return coloured
    mask = read_part_mask(ref, path)
    in_voc = "segmentationclass" in (parent.name.lower() for parent in list(path.parents)[:2])
    if is_picture and in_voc and davis_frames.picture_mode(path) == "P":
        mask = davis_frames.without_void(ref, mask)  # Pascal VOC draws borders in 255
    return mask


def _told_apart(ref: CaseRef, mask: MaskRaster) -> MaskRaster:
    """One of several masks of an image: named by what its file's name adds, else each an object of its own."""
    if mask.labels or mask.planes.shape[0] != 1:
        return mask
    bids = BIDS.search(mask.path.name)
    only = ref.labels[0][1] if len(ref.labels) == 1 else "" if bids else "object"
    if not mask.exact:
        return replace(mask, labels=(Label(1, only or (bids["seg"] if bids else "object")),))
    values = present_values(mask.planes[0])
    if only and len(values) == 1:
        return replace(mask, labels=(Label(values[0], only),))
    names = {values_[0]: name for values_, name in ref.labels}
    prefix = f"{bids['seg']}_" if bids else "label_"
    return replace(mask, labels=tuple(Label(value, names.get(value, f"{prefix}{value}")) for value in values))


def _places(path: Path) -> list[_Place]:
    """Where images and masks lie at `path`."""
    pair = _folder_pair(path)
    if pair:
        images, masks = pair
        parts = {c.name.lower(): c for c in list_folders(images) if c.name.lower() in SPLITS}
        others = {c.name.lower(): c for c in list_folders(masks)}
        both = [name for name in parts if name in others]
        if both:
            return [_Place(parts[name], others[name], SPLITS[name]) for name in both]
        return [_Place(images, masks)]
    below = [
        (child, found)
        for child in list_folders(path)
        if child.name.lower() in SPLITS and (found := _folder_pair(child)) is not None
    ]
    if below:
        return [_Place(images, masks, SPLITS[child.name.lower()]) for child, (images, masks) in below]
    place = _Place(path, path)
    pairs = _pairs(place)
    return [place] if any(masks for _, masks in pairs) and not any(_is_mask(image) for image, _ in pairs) else []


def _folder_pair(path: Path) -> tuple[Path, Path] | None:
    here = {child.name.lower(): child for child in list_folders(path)}
    pairs = itertools.product(IMAGE_FOLDERS, MASK_FOLDERS)
    return next(((here[images], here[masks]) for images, masks in pairs if images in here and masks in here), None)


def _pairs(place: _Place) -> list[tuple[Path, tuple[Path, ...]]]:
    """Every image with its masks; where a mask has no image, the image that is missing."""
    images, masks = _entries(place.images), _entries(place.masks)
    if place.images == place.masks:
        images = [entry for entry in images if not _is_mask(entry)]
        masks = [entry for entry in masks if entry.is_file() and _is_mask(entry)]
    by_name = {stem(image).lower(): image for image in images}
    found: dict[Path, list[Path]] = {image: [] for image in images}
    for mask in masks:
        found.setdefault(_image_of(mask, by_name) or place.images / mask.name, []).append(mask)
    return [(image, tuple(of_image)) for image, of_image in sorted(found.items())]


def _is_mask(path: Path) -> bool:
    name = stem(path)
    return bool(SUFFIX.fullmatch(name) or PREFIX.fullmatch(name))


def _image_of(mask: Path, by_name: Mapping[str, Path]) -> Path | None:
    """The image that a mask's name belongs to: its own name, or what is left without the word for a mask."""
    name = stem(mask).lower()
    options = [name]
    without = BIDS.sub("", name)
    for ending in (SUFFIX.fullmatch(name), SUFFIX.fullmatch(without)):
        options += [ending["base"] + tag for tag in AFTER] if ending else []
    start = PREFIX.fullmatch(name)
    options += [tag + start["base"] for tag in BEFORE] if start else []
    options += [name + tag for tag in AFTER[1:4]]
    direct = next((by_name[option] for option in options if option in by_name), None)
    if direct is not None or without == name:
        return direct
    whole = SUFFIX.fullmatch(without)
    base = whole["base"] if whole else without
    close = [image for text, image in by_name.items() if text.startswith(f"{base}_")]
    return close[0] if len(close) == 1 else None


def _entries(folder: Path) -> list[Path]:
    return [child for child in list_visible(folder) if _known(child) or child.is_dir()]


def _known(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS) and not path.name.startswith(".") and path.is_file()
