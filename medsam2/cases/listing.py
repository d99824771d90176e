"""What layouts share that list files: names of cases, paths that stay inside, channels, slices in time, structures."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from medsam2.cases.case import Case, CaseError
from medsam2.cases.layouts.registry import CaseRef
from medsam2.cases.raster import MaskRaster, Raster
from medsam2.cases.values import present_values

SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
"""How data sets call their splits -> how we do."""

ENDING = re.compile(r"(\.nii\.gz|\.seg\.nrrd|\.ome\.tiff?|\.[A-Za-z][A-Za-z0-9]{0,7})$", re.IGNORECASE)
FILE_EACH = "a file each"
"""`CaseRef.part` where every mask file is one structure: `labels` name them in the order of `masks`."""
PART = re.compile(
    rf"(?:(?P<rgb>rgb)|(?P<file_each>{FILE_EACH})|channel (?P<channel>\d+)(?P<inside> of \d+)?)?"
    r"(?: ?slice (?P<slice>\d+))?"
)

Pairs = tuple[tuple[tuple[int, ...], str], ...]


def stem(path: Path) -> str:
    """A file's name without its ending (`.nii.gz` is one), a folder's whole name (UIDs hold dots)."""
    return path.name if path.is_dir() else ENDING.sub("", path.name) or path.name


def case_names(paths: Sequence[Path]) -> list[str]:
    """A name for each image: its stem, behind its folder's name where several have one stem (`s01/ct.nii.gz`)."""
    stems = [stem(path) for path in paths]
    often = Counter(stems)
    return [f"{p.absolute().parent.name}_{s}" if often[s] > 1 else s for p, s in zip(paths, stems, strict=True)]


def within(root: Path, text: str, where: Path) -> Path:
    """The file that `where` names relative to `root`. A downloaded list must not lead to files elsewhere.

    Raises:
        CaseError: an absolute path, or one that leads out of `root`.
    """
    depth = 0
    for part in PurePosixPath(text).parts:
        depth += -1 if part == ".." else part != "."
        if depth < 0 or part == "/":
            raise CaseError(
                f"{where}: {text!r} leads out of {root}; expected a path inside of it. Where the files do lie "
                "elsewhere, list them in a manifest.csv of your own."
            )
    return root / text


def label_pairs(labels: Mapping[str, Any], where: Path | str) -> Pairs:
    """`{"liver": 1, "whole": [1, 2]}` and the older `{"1": "liver"}` as (values, name); without background.

    Raises:
        CaseError: a value that is no whole number.
    """
    pairs = []
    for key, value in labels.items():
        name, found = (str(value), key) if isinstance(value, str) and key.isdecimal() else (key, value)
        try:
            values = tuple(int(v) for v in (found if isinstance(found, list | tuple) else (found,)))
        except (TypeError, ValueError):
            raise CaseError(
                f"{where}: labels: {key!r}: {value!r} is neither a whole number nor a list of them; expected e.g. "
                '{"liver": 1}.'
            ) from None
        if name != "ignore" and any(values):
            pairs.append((values, name))
    return tuple(pairs)


def channel_names(description: Mapping[str, Any]) -> list[str]:
    """Names of the channels in order (`channel_names`, or `modality` in version 1); empty where none are named."""
    found = description.get("channel_names") or description.get("modality") or {}
    if isinstance(found, str):
        return [found]
    if isinstance(found, list):
        return [str(name) for name in found]
    return [str(found[key]) for key in sorted(found, key=lambda k: (len(str(k)), str(k)))]


def each_slice(ref: CaseRef) -> list[CaseRef]:
    """One reference a slice where the image is 4-D (x, y, z, t): a clip in time each. Else `ref` itself."""
    from medsam2.cases.formats.volume import time_slices

    if ref.problem:
        return [ref]
    try:
        count = time_slices(ref.images[0])
        if not count:
            return [ref]
        for mask in ref.masks:
            found = time_slices(mask)
            if found != count:
                has = f"has {found} slices in time" if found else "is not 4-D"
                return [
                    replace(
                        ref,
                        problem=f"{mask}: {has}, but its image {ref.images[0]} is 4-D with {count} slices in time; "
                        "give a 4-D mask of the same shape, or 3-D images.",
                    )
                ]
    except CaseError as error:
        return [replace(ref, problem=str(error))]
    return [with_slice(ref, z) for z in range(count)]


def with_slice(ref: CaseRef, z: int) -> CaseRef:
    """The reference of one slice in time; a channel stays the end of the case's name."""
    channel = channel_of(ref)
    suffix = "" if channel is None else f"_{channel:04d}"
    name = f"{ref.case_id.removesuffix(suffix)}_slice{z:03d}{suffix}"
    return replace(ref, case_id=name, part=f"{ref.part} slice {z}".strip())


def _part(ref: CaseRef) -> dict[str, str]:
    """The groups of `PART` in a reference's part; "" where one is not there."""
    found = PART.fullmatch(ref.part)
    return found.groupdict("") if found else dict.fromkeys(PART.groupindex, "")


def channel_of(ref: CaseRef) -> int | None:
    """The channel that a reference stands for, or None where its case has but one."""
    channel = _part(ref)["channel"]
    return int(channel) if channel else None


def settle_channels(refs: list[CaseRef]) -> list[CaseRef]:
    """What `settings.channels` makes of the channels of a case: each a case, the first alone, or three in one RGB."""
    kept, groups = [], defaultdict(list)
    for ref in refs:
        channel = channel_of(ref)
        if channel is None or ref.settings.channels == "each":
            kept.append(ref)
        else:
            groups[ref.dataset, ref.case_id.removesuffix(f"_{channel:04d}")].append((channel, ref))
    for (_, name), group in groups.items():
        ordered = [ref for _, ref in sorted(group, key=lambda entry: entry[0])]
        first = replace(ordered[0], case_id=name)
        kept.append(first if first.settings.channels == "first" else _folded(first, ordered))
    return kept


def _folded(first: CaseRef, ordered: list[CaseRef]) -> CaseRef:
    problem = next((ref.problem for ref in ordered if ref.problem), "")
    if len(ordered) != 3:
        problem = f"{first.images[0]}: channels: rgb needs 3 channels, found {len(ordered)}; choose each or first."
    in_time = _part(first)["slice"]
    part = f"rgb slice {in_time}" if in_time else "rgb"
    images = tuple(dict.fromkeys(path for ref in ordered for path in ref.images))
    return replace(first, images=images, part=part, problem=problem)


def read_part(ref: CaseRef) -> Raster:
    """The image of a reference: its file, or the channel and the slice in time that `part` names."""
    from medsam2.cases.formats.registry import read_image
    from medsam2.cases.formats.volume import read_channel, read_time_slice

    part = _part(ref)
    if part["inside"]:
        return read_channel(ref.images[0], int(part["channel"]), ref.settings)
    if part["rgb"] and len(ref.images) == 1:
        return _rgb([read_channel(ref.images[0], channel, ref.settings) for channel in range(3)])
    paths = ref.images if part["rgb"] else ref.images[:1]
    if part["slice"]:
        images = [read_time_slice(path, int(part["slice"]), ref.settings) for path in paths]
    else:
        images = [read_image(path, ref.settings) for path in paths]
    return _rgb(images) if part["rgb"] else images[0]


def read_part_mask(ref: CaseRef, path: Path) -> MaskRaster:
    """A mask of a reference, of the slice in time that `part` names."""
    from medsam2.cases.formats.registry import read_mask
    from medsam2.cases.formats.volume import read_mask_time_slice

    in_time = _part(ref)["slice"]
    if in_time:
        return read_mask_time_slice(path, int(in_time), ref.settings)
    return read_mask(path, ref.settings)


def load_listed(ref: CaseRef) -> Case:
    """The case of a reference whose files are plainly listed: its image (or part of it) under its masks."""
    from medsam2.cases.assemble import assemble

    image = with_stated_spacing(ref, read_part(ref))
    if _part(ref)["file_each"]:
        # each file is read when its turn comes: a hundred masks are never held at once; they carry the names
        structures = [partial(_read_structure, ref, index) for index in range(len(ref.masks))]
        return assemble(replace(ref, labels=()), image, structures)
    masks = [read_part_mask(ref, path) for path in ref.masks]
    if len(masks) > 1 and not ref.labels:
        masks = [_named_by_file(mask) for mask in masks]
    return assemble(ref, image, masks)


def with_stated_spacing(ref: CaseRef, image: Raster) -> Raster:
    """The image under the frame rate and pixel size that its listing states; an affine of its own wins."""
    seconds, pixel = ref.spacing
    z, y, x = image.spacing
    if image.moving and seconds:
        z = seconds
    if pixel and image.affine is None:
        y = x = pixel
    return replace(image, spacing=(z, y, x))


def _named_by_file(mask: MaskRaster) -> MaskRaster:
    """One of several masks for which nobody gives names: its file's name tells them apart."""
    if mask.labels or mask.planes.shape[0] != 1:
        return mask
    name = stem(mask.path)
    if mask.lossy or mask.planes.dtype.kind == "f":
        return replace(mask, labels=((0, 1, name),))
    values = present_values(mask.planes[0])
    names = [name] if len(values) < 2 else [f"{name}_{value}" for value in values]
    return replace(mask, labels=tuple((0, value, text) for value, text in zip(values, names, strict=False)))


def _rgb(channels: list[Raster]) -> Raster:
    """Three grey images as one in colour."""
    for raster in channels:
        if raster.array.dtype != np.uint8 or raster.array.shape != channels[0].array.shape or raster.array.ndim != 3:
            first = channels[0].array
            raise CaseError(
                f"{raster.path}: channels: rgb needs three uint8 grey images of one shape, found {raster.array.dtype} "
                f"{raster.array.shape} beside {first.dtype} {first.shape}; choose each or first."
            )
    return replace(channels[0], array=np.stack([raster.array for raster in channels], axis=-1))


def _read_structure(ref: CaseRef, index: int) -> MaskRaster:
    """One mask file as one structure: whatever is not 0."""
    mask, name = read_part_mask(ref, ref.masks[index]), ref.labels[index][1]
    if mask.lossy or mask.planes.dtype.kind == "f":
        return replace(mask, labels=((0, 1, name),))  # `threshold` says what is foreground
    solid = np.asarray(mask.planes.any(axis=0))
    return replace(mask, planes=solid[None].astype(np.uint8), labels=((0, 1, name),))


def one_split(name: Any, where: str) -> str:
    """Our name for a split; "" for none.

    Raises:
        CaseError: not a known one.
    """
    text = str(name or "").strip().lower()
    if text and text not in SPLITS:
        raise CaseError(f"{where}: split {name!r} is not one of train, val, test.")
    return SPLITS.get(text, "")
