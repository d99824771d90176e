"""Helpers shared by layouts: case names, safe paths, `meta.json`, channels, slices in time, structures."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from medsam2.cases.assemble import assemble
from medsam2.cases.case import Case, CaseError, CaseRef, Label, Origin, Part
from medsam2.cases.formats.registry import read_image, read_mask
from medsam2.cases.formats.volume import count_time_slices, read_channel, read_time_slice
from medsam2.cases.raster import MaskRaster, Raster, read_json
from medsam2.cases.values import as_labels, present_values
from medsam2.errors import first_problem

SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
"""Names of splits in datasets, and ours for each."""
CHANNEL_WORDS = {
    "CT": ("ct", "cbct", "hu"),
    "MR": ("mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "flair", "adc", "dwi", "pd", "cine"),
    "PT": ("pt", "pet", "suv"),
    "US": ("us", "ultrasound", "echo"),
    "XRAY": ("xray", "x-ray", "cr", "dx"),
    "ENDOSCOPY": ("endoscopy", "endo", "colonoscopy"),
    "MICROSCOPY": ("microscopy", "fluorescence", "em"),
    "PATHOLOGY": ("pathology",),
}
"""Words in channel names that reveal the modality. Other names need --modality, because a guess may be wrong."""
FILE_ENDING = re.compile(r"(\.nii\.gz|\.seg\.nrrd|\.ome\.tiff?|\.[A-Za-z][A-Za-z0-9]{0,7})$", re.IGNORECASE)

Pairs = tuple[tuple[tuple[int, ...], str], ...]


class ClipMeta(BaseModel):
    """Content of `meta.json` beside clips; all fields are optional. `patients` maps a clip's name to its patient."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    modality: str = ""
    labels: dict[str, int] = {}
    fps: float | None = None
    spacing_mm: float | None = None
    patients: dict[str, str] = {}
    source: str = ""
    licence: str = ""


def stem(path: Path) -> str:
    """Return a file's name without its ending (e.g. `.nii.gz`), or a folder's whole name (UIDs contain dots)."""
    return path.name if path.is_dir() else FILE_ENDING.sub("", path.name) or path.name


def case_names(paths: Sequence[Path]) -> list[str]:
    """Name each image by its stem; prefix the folder's name to stems that occur several times (`s01/ct.nii.gz`)."""
    stems = [stem(path) for path in paths]
    stem_counts = Counter(stems)
    return [f"{p.absolute().parent.name}_{s}" if stem_counts[s] > 1 else s for p, s in zip(paths, stems, strict=True)]


def resolve_inside(root: Path, text: str, where: Path) -> Path:
    """Join `root` and a path from the file `where`; a downloaded list must not point outside its folder.

    Raises:
        CaseError: the path is absolute or leads out of `root`.
    """
    depth = 0
    for part in PurePosixPath(text).parts:
        depth += -1 if part == ".." else part != "."
        if depth < 0 or part == "/":
            raise CaseError(
                f"{where}: {text!r} leads out of {root}; expected a path inside it. If the files are "
                "elsewhere, list them in a manifest.csv."
            )
    return root / text


def missing_file(paths: Iterable[Path], reason: str, exists: Callable[[Path], bool] = Path.exists) -> str:
    """Describe the first missing file and the `reason` to expect it; "" if none is missing."""
    missing = next((path for path in paths if not exists(path)), None)
    return f"{missing}: no such file or folder, but {reason}." if missing else ""


def list_visible(folder: Path) -> list[Path]:
    """List a folder by name, without hidden files (macOS writes `._NAME` beside a file)."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def list_folders(folder: Path) -> list[Path]:
    """List the folders in a folder by name, without hidden ones."""
    return [child for child in list_visible(folder) if child.is_dir()]


def read_meta(folder: Path) -> ClipMeta:
    """Read `meta.json` of a dataset, or return the defaults if there is none."""
    path = folder / "meta.json"
    if not path.is_file():
        return ClipMeta()
    try:
        return ClipMeta.model_validate(read_json(path))
    except ValidationError as error:
        raise CaseError(f"{path}: {first_problem(error)}.") from None


def ref_from_meta(
    folder: Path, name: str, image: Path, masks: tuple[Path, ...], meta: ClipMeta, problem: str = ""
) -> CaseRef:
    """Return the reference of one image or clip of a dataset with a `meta.json`."""
    missing = next((mask for mask in masks if not mask.exists()), None)
    return CaseRef(
        folder.absolute().name,
        name,
        meta.patients.get(name, name),
        images=(image,),
        masks=masks,
        modality=meta.modality.upper(),
        labels=tuple(((value,), label) for label, value in meta.labels.items() if value != 0),
        spacing=(1.0 / meta.fps if meta.fps else 0.0, meta.spacing_mm or 0.0),
        origin=Origin.from_description({"source": meta.source, "licence": meta.licence}),
        problem=problem or (f"{image}: the masks are missing; expected {missing}." if missing else ""),
    )


def label_pairs(labels: Mapping[str, Any], where: Path | str) -> Pairs:
    """Parse `{"liver": 1, "whole": [1, 2]}` or the older `{"1": "liver"}` to (values, name) without background.

    Raises:
        CaseError: a value is not a whole number.
    """
    pairs = []
    for key, value in labels.items():
        name, number = (str(value), key) if isinstance(value, str) and key.isdecimal() else (key, value)
        try:
            values = tuple(int(v) for v in (number if isinstance(number, list | tuple) else (number,)))
        except (TypeError, ValueError):
            raise CaseError(
                f"{where}: labels: {key!r}: {value!r} is neither a whole number nor a list of them; expected e.g. "
                '{"liver": 1}.'
            ) from None
        if name != "ignore" and any(values):
            pairs.append((values, name))
    return tuple(pairs)


def channel_names(description: Mapping[str, Any]) -> list[str]:
    """Return the channel names in order (`channel_names`, or `modality` in nnU-Net version 1); may be empty."""
    names = description.get("channel_names") or description.get("modality") or {}
    if isinstance(names, str):
        return [names]
    if isinstance(names, list):
        return [str(name) for name in names]
    return [str(names[key]) for key in sorted(names, key=lambda k: (len(str(k)), str(k)))]


def modality_of(channel: str) -> str:
    """Return the modality of a channel name, or "" if unknown."""
    words = channel.lower().replace("_", " ").split()
    return next((m for m, known in CHANNEL_WORDS.items() if any(word in known for word in words)), "")


def split_channels(ref: CaseRef, names: Sequence[str]) -> list[CaseRef]:
    """Return one reference per channel: one file each, or the fourth axis of a single file with several names."""
    inside = len(ref.images) == 1
    count = len(names) if inside else len(ref.images)
    titles = [*names, *[""] * max(1, count)]
    if count < 2:
        return [replace(ref, modality=modality_of(titles[0]))]
    return [
        replace(
            ref,
            images=ref.images if inside else (ref.images[number],),
            case_id=f"{ref.case_id}_{number:04d}",
            part=Part(channel=number, inside=inside),
            modality=modality_of(titles[number]),
        )
        for number in range(count)
    ]


def split_time_slices(ref: CaseRef) -> list[CaseRef]:
    """Return one reference per slice of a 4-D image (x, y, z, t), each a clip in time; else only `ref`."""
    if ref.problem or ref.part.inside or not ref.images:
        return [ref]
    try:
        count = count_time_slices(ref.images[0])
        for mask in ref.masks if count else ():
            mask_count = count_time_slices(mask)
            if mask_count != count:
                has = f"has {mask_count} slices in time" if mask_count else "is not 4-D"
                raise CaseError(
                    f"{mask}: {has}, but its image {ref.images[0]} is 4-D with {count} slices in time; give a 4-D "
                    "mask of the same shape, or 3-D images."
                )
    except CaseError as error:
        return [replace(ref, problem=str(error))]
    return [_time_slice(ref, z) for z in range(count)] or [ref]


def _time_slice(ref: CaseRef, z: int) -> CaseRef:
    """Return the reference of one slice in time; the channel remains the end of the case's name."""
    suffix = "" if ref.part.channel is None else f"_{ref.part.channel:04d}"
    name = f"{ref.case_id.removesuffix(suffix)}_slice{z:03d}{suffix}"
    return replace(ref, case_id=name, part=replace(ref.part, time_slice=z))


def combine_channels(refs: Iterable[CaseRef]) -> list[CaseRef]:
    """Apply `settings.channels`: a case per channel, the first channel only, or three channels as RGB."""
    cases, groups = [], defaultdict(list)
    for ref in refs:
        if ref.part.channel is None or ref.settings.channels == "each":
            cases.append(ref)
        else:
            groups[ref.dataset, ref.case_id.removesuffix(f"_{ref.part.channel:04d}")].append(ref)
    for (_, name), group in groups.items():
        ordered = sorted(group, key=lambda ref: ref.part.channel or 0)
        first = replace(ordered[0], case_id=name)
        cases.append(first if first.settings.channels == "first" else _rgb_ref(first, ordered))
    return cases


def _rgb_ref(first: CaseRef, ordered: list[CaseRef]) -> CaseRef:
    problem = next((ref.problem for ref in ordered if ref.problem), "")
    if len(ordered) != 3:
        problem = f"{first.images[0]}: channels: rgb needs 3 channels, not {len(ordered)}; choose each or first."
    images = tuple(dict.fromkeys(path for ref in ordered for path in ref.images))
    return replace(first, images=images, part=replace(first.part, channel=None, rgb=True), problem=problem)


def read_part(ref: CaseRef) -> Raster:
    """Read the image of a reference: its file, or the channels and the slice in time in `part`."""
    part, settings = ref.part, ref.settings
    paths = ref.images if part.rgb else ref.images[:1]
    if part.inside:
        images = [read_channel(paths[0], n) for n in (range(3) if part.rgb else (part.channel or 0,))]
    elif part.time_slice is not None:
        images = [read_time_slice(path, part.time_slice) for path in paths]
    else:
        images = [read_image(path, settings) for path in paths]
    return _rgb(images) if part.rgb else images[0]


def read_part_mask(ref: CaseRef, path: Path) -> MaskRaster:
    """Read a mask of a reference, or its slice in time in `part`."""
    if ref.part.time_slice is not None:
        labels = read_time_slice(path, ref.part.time_slice).array
        return MaskRaster(as_labels(labels, path)[None], path)
    return read_mask(path, ref.settings)


def load_listed(ref: CaseRef) -> Case:
    """Load a case whose reference lists all its files."""
    image = apply_listed_spacing(ref, read_part(ref))
    if ref.part.file_per_structure:
        # a generator, so that only one of up to a hundred masks is in memory; the files give the names
        structures = (_read_structure(ref, index) for index in range(len(ref.masks)))
        return assemble(replace(ref, labels=()), image, structures)
    masks = [read_part_mask(ref, path) for path in ref.masks]
    if len(masks) > 1 and not ref.labels:
        masks = [_name_by_file(mask) for mask in masks]
    return assemble(ref, image, masks)


def apply_listed_spacing(ref: CaseRef, image: Raster) -> Raster:
    """Apply the frame rate and pixel size in the listing; an affine in the image takes precedence."""
    seconds, pixel = ref.spacing
    z, y, x = image.spacing
    if image.moving and seconds:
        z = seconds
    if pixel and image.affine is None:
        y = x = pixel
    return replace(image, spacing=(z, y, x))


def _name_by_file(mask: MaskRaster) -> MaskRaster:
    """Name one of several masks after its file, if neither the file nor the dataset names its labels."""
    if mask.labels or mask.planes.shape[0] != 1:
        return mask
    name = stem(mask.path)
    if not mask.exact:
        return replace(mask, labels=(Label(1, name),))
    values = present_values(mask.planes[0])
    return replace(mask, labels=tuple(Label(v, name if len(values) < 2 else f"{name}_{v}") for v in values))


def _rgb(channels: list[Raster]) -> Raster:
    """Combine three grey images into a colour image."""
    for raster in channels:
        if raster.array.dtype != np.uint8 or raster.array.shape != channels[0].array.shape or raster.array.ndim != 3:
            first = channels[0].array
            raise CaseError(
                f"{raster.path}: channels: rgb needs three uint8 grey images of one shape, not {raster.array.dtype} "
                f"{raster.array.shape} beside {first.dtype} {first.shape}; choose each or first."
            )
    return replace(channels[0], array=np.stack([raster.array for raster in channels], axis=-1))


def _read_structure(ref: CaseRef, index: int) -> MaskRaster:
    """Read one mask file as one structure, nonzero inside."""
    mask = read_part_mask(ref, ref.masks[index])
    return as_structure(replace(mask, planes=mask.planes.max(axis=0, keepdims=True)), ref.labels[index][1])


def as_structure(mask: MaskRaster, name: str) -> MaskRaster:
    """Convert a mask to one structure, nonzero inside; inexact values await the user's `threshold`."""
    planes = (mask.planes > 0).astype(np.uint8) if mask.exact else mask.planes
    return replace(mask, planes=planes, labels=(Label(1, name),))
