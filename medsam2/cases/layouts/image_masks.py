"""Images beside masks, matched by name: two folders, or pairs in one.

    images/a.png   masks/a.png          also img, imgs, image, JPEGImages; mask, label, labels, SegmentationClass;
    images/a.nii.gz   labels/a.nii.gz   masks may end in _mask, _seg, _label; masks/a/ holds one file per object
    train/images/...  or  images/train/...   and the same for val and test, which set the split
    a_image.nrrd beside a_label.nrrd, a.png beside a_mask.png, img2d.tif beside mask2d.tif

Every file or folder that a format can read is a case. `meta.json` is optional.
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

MASK_WORDS = "mask|masks|seg|label|labels|msk|segmentation|gt"
MASK_SUFFIX = re.compile(rf"(?P<base>.+?)[ _-](?:{MASK_WORDS})(?:[ _-]?\d+)?", re.IGNORECASE)
MASK_PREFIX = re.compile(r"(?:mask|label|seg)(?P<base>[ _-]?.+)", re.IGNORECASE)
BIDS_SEGMENTATION = re.compile(r"_seg-(?P<seg>[^_]+)")
IMAGE_SUFFIXES = ("", "_image", "_img", "_im", "_ct", "_mr", "_mri", "_pet", "_us")
IMAGE_PREFIXES = ("img", "image", "im")


@dataclass(frozen=True)
class _FolderPair:
    """The folders of images and masks, which may be the same, and the split that they belong to."""

    images: Path
    masks: Path
    split: str = ""


def recognise(path: Path) -> bool:
    return path.is_dir() and any(masks for place in _find_folder_pairs(path) for _, masks in _pairs(place))


def find(path: Path) -> list[CaseRef]:
    """List one case per image. Images without mask and masks without image are listed, and fail when read."""
    meta = read_meta(path)
    pairs = [(place, *pair) for place in _find_folder_pairs(path) for pair in _pairs(place)]
    stem_counts = Counter(stem(image) for _, image, _ in pairs)
    refs: list[CaseRef] = []
    for place, image, masks in pairs:
        if not masks and place.images == place.masks:
            continue  # a common folder may hold unrelated files
        name = stem(image)
        problem = ""
        if not masks:
            problem = f"{image}: the mask {place.masks / name}.* is missing; add it, empty if there are no objects."
        elif not image.exists():
            problem = f"{masks[0]}: the image {image.with_suffix('')}.* is missing; add it, or remove the mask."
        case = f"{place.split}_{name}" if stem_counts[name] > 1 and place.split else name
        ref = ref_from_meta(path, name, image, masks, meta, problem)
        refs.append(replace(ref, case_id=case, split=place.split))
    return refs


def load(ref: CaseRef) -> Case:
    """Load the image with its mask or masks."""
    image = apply_listed_spacing(ref, read_part(ref))
    return assemble(ref, image, (mask for path in ref.masks for mask in _read_masks(ref, path, image)))


def _read_masks(ref: CaseRef, path: Path, image: Raster) -> Iterator[MaskRaster]:
    if path.is_dir() and image.moving:
        pick = partial(davis_frames.match_masks, list_frames(ref.images[0]))
        for mask in davis_frames.read_frame_masks(ref, path, pick, davis_frames.read_label_frames):
            yield davis_frames.name_binary_mask(ref, mask)
    elif path.is_dir() and any(_is_readable(child) for child in path.iterdir()):
        for child in filter(_is_readable, list_visible(path)):
            yield davis_frames.name_object(ref, read_part_mask(ref, child), stem(child))
    else:
        mask = davis_frames.name_binary_mask(ref, _one_mask(ref, path))
        yield mask if len(ref.masks) == 1 else _name_labels(ref, mask)


def _one_mask(ref: CaseRef, path: Path) -> MaskRaster:
    is_picture = path.suffix.lower() in PICTURE_ENDINGS
    colour_mask = davis_frames.read_by_colour_table([path]) if is_picture else None
    if colour_mask is not None:
        return colour_mask
    mask = read_part_mask(ref, path)
    in_voc = "segmentationclass" in (parent.name.lower() for parent in list(path.parents)[:2])
    if is_picture and in_voc and davis_frames.picture_mode(path) == "P":
        mask = davis_frames.clear_void(ref, mask)  # Pascal VOC draws borders in 255
    return mask


def _name_labels(ref: CaseRef, mask: MaskRaster) -> MaskRaster:
    """Name one of several masks of an image after its file's suffix; without one, each mask is a separate object."""
    if mask.labels or mask.planes.shape[0] != 1:
        return mask
    bids = BIDS_SEGMENTATION.search(mask.path.name)
    default = ref.labels[0][1] if len(ref.labels) == 1 else "" if bids else "object"
    if not mask.exact:
        return replace(mask, labels=(Label(1, default or (bids["seg"] if bids else "object")),))
    values = present_values(mask.planes[0])
    if default and len(values) == 1:
        return replace(mask, labels=(Label(values[0], default),))
    names = {values_[0]: name for values_, name in ref.labels}
    prefix = f"{bids['seg']}_" if bids else "label_"
    return replace(mask, labels=tuple(Label(value, names.get(value, f"{prefix}{value}")) for value in values))


def _find_folder_pairs(path: Path) -> list[_FolderPair]:
    """Find the folders of images and masks in `path`."""
    pair = _folder_pair(path)
    if pair:
        images, masks = pair
        image_splits = {c.name.lower(): c for c in list_folders(images) if c.name.lower() in SPLITS}
        mask_splits = {c.name.lower(): c for c in list_folders(masks)}
        both = [name for name in image_splits if name in mask_splits]
        if both:
            return [_FolderPair(image_splits[name], mask_splits[name], SPLITS[name]) for name in both]
        return [_FolderPair(images, masks)]
    splits = ((child, _folder_pair(child)) for child in list_folders(path) if child.name.lower() in SPLITS)
    split_pairs = [_FolderPair(*pair, SPLITS[child.name.lower()]) for child, pair in splits if pair]
    if split_pairs:
        return split_pairs
    place = _FolderPair(path, path)
    pairs = _pairs(place)
    return [place] if any(masks for _, masks in pairs) and not any(_is_mask(image) for image, _ in pairs) else []


def _folder_pair(path: Path) -> tuple[Path, Path] | None:
    folders = {child.name.lower(): child for child in list_folders(path)}
    pairs = itertools.product(IMAGE_FOLDERS, MASK_FOLDERS)
    return next(
        ((folders[images], folders[masks]) for images, masks in pairs if images in folders and masks in folders), None
    )


def _pairs(place: _FolderPair) -> list[tuple[Path, tuple[Path, ...]]]:
    """Return every image with its masks, and the expected path of an image for a mask without one."""
    images, masks = _entries(place.images), _entries(place.masks)
    if place.images == place.masks:
        images = [entry for entry in images if not _is_mask(entry)]
        masks = [entry for entry in masks if entry.is_file() and _is_mask(entry)]
    by_name = {stem(image).lower(): image for image in images}
    masks_by_image: dict[Path, list[Path]] = {image: [] for image in images}
    for mask in masks:
        masks_by_image.setdefault(_image_of(mask, by_name) or place.images / mask.name, []).append(mask)
    return [(image, tuple(image_masks)) for image, image_masks in sorted(masks_by_image.items())]


def _is_mask(path: Path) -> bool:
    name = stem(path)
    return bool(MASK_SUFFIX.fullmatch(name) or MASK_PREFIX.fullmatch(name))


def _image_of(mask: Path, by_name: Mapping[str, Path]) -> Path | None:
    """Find the image of a mask: of the same name, or of the name without the word for a mask."""
    name = stem(mask).lower()
    options = [name]
    without = BIDS_SEGMENTATION.sub("", name)
    for ending in (MASK_SUFFIX.fullmatch(name), MASK_SUFFIX.fullmatch(without)):
        options += [ending["base"] + tag for tag in IMAGE_SUFFIXES] if ending else []
    prefix = MASK_PREFIX.fullmatch(name)
    options += [tag + prefix["base"] for tag in IMAGE_PREFIXES] if prefix else []
    options += [name + tag for tag in IMAGE_SUFFIXES[1:4]]
    image = next((by_name[option] for option in options if option in by_name), None)
    if image is not None or without == name:
        return image
    suffix = MASK_SUFFIX.fullmatch(without)
    base = suffix["base"] if suffix else without
    candidates = [image for text, image in by_name.items() if text.startswith(f"{base}_")]
    return candidates[0] if len(candidates) == 1 else None


def _entries(folder: Path) -> list[Path]:
    return [child for child in list_visible(folder) if _is_readable(child) or child.is_dir()]


def _is_readable(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS) and not path.name.startswith(".") and path.is_file()
