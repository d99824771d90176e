"""What layouts share: names of cases, paths that stay inside, `meta.json`, channels, slices in time, structures."""

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
"""How data sets call their splits -> how we do."""
CHANNELS = {
    "CT": ("ct", "cbct", "hu"),
    "MR": ("mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "flair", "adc", "dwi", "pd", "cine"),
    "PT": ("pt", "pet", "suv"),
    "US": ("us", "ultrasound", "echo"),
    "XRAY": ("xray", "x-ray", "cr", "dx"),
    "ENDOSCOPY": ("endoscopy", "endo", "colonoscopy"),
    "MICROSCOPY": ("microscopy", "fluorescence", "em"),
    "PATHOLOGY": ("pathology",),
}
"""What data sets call their channels and modalities; anything else needs --modality, never a silent guess."""
ENDING = re.compile(r"(\.nii\.gz|\.seg\.nrrd|\.ome\.tiff?|\.[A-Za-z][A-Za-z0-9]{0,7})$", re.IGNORECASE)

Pairs = tuple[tuple[tuple[int, ...], str], ...]


class ClipMeta(BaseModel):
    """What `meta.json` beside clips may say; every field is optional. `patients` maps a clip's name to its patient."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    modality: str = ""
    labels: dict[str, int] = {}
    fps: float | None = None
    spacing_mm: float | None = None
    patients: dict[str, str] = {}
    source: str = ""
    licence: str = ""


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


def missing_file(paths: Iterable[Path], why: str, there: Callable[[Path], bool] = Path.exists) -> str:
    """What is wrong with a case one of whose files is not `there`, though `why` it should be; "" if all are."""
    missing = next((path for path in paths if not there(path)), None)
    return f"{missing}: no such file or folder, but {why}." if missing else ""


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, by name, but hidden files (macOS leaves `._NAME` beside a file)."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, by name, but hidden ones."""
    return [child for child in visible(folder) if child.is_dir()]


def read_meta(folder: Path) -> ClipMeta:
    """`meta.json` of a data set of clips, or the defaults where there is none."""
    path = folder / "meta.json"
    if not path.is_file():
        return ClipMeta()
    try:
        return ClipMeta.model_validate(read_json(path))
    except ValidationError as error:
        raise CaseError(f"{path}: {first_problem(error)}.") from None


def described_ref(
    folder: Path, name: str, image: Path, masks: tuple[Path, ...], meta: ClipMeta, problem: str = ""
) -> CaseRef:
    """The reference of one image or clip of a data set with a `meta.json`."""
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
        origin=Origin.stated({"source": meta.source, "licence": meta.licence}),
        problem=problem or (f"{image}: no masks for it, expected {missing}." if missing else ""),
    )


def label_pairs(labels: Mapping[str, Any], where: Path | str) -> Pairs:
    """`{"liver": 1, "whole": [1, 2]}` and the older `{"1": "liver"}` as (values, name); without background.

    Raises:
        CaseError: a value that is no whole number.
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
    """Names of the channels in order (`channel_names`, or `modality` in version 1); empty where none are named."""
    names = description.get("channel_names") or description.get("modality") or {}
    if isinstance(names, str):
        return [names]
    if isinstance(names, list):
        return [str(name) for name in names]
    return [str(names[key]) for key in sorted(names, key=lambda k: (len(str(k)), str(k)))]


def modality_of(channel: str) -> str:
    """Our modality for a channel name, or "" where it is not known."""
    words = channel.lower().replace("_", " ").split()
    return next((m for m, known in CHANNELS.items() if any(word in known for word in words)), "")


def each_channel(ref: CaseRef, names: Sequence[str]) -> list[CaseRef]:
    """One reference a channel: a file of its own each, or the fourth axis of the one file where several have names."""
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


def each_slice(ref: CaseRef) -> list[CaseRef]:
    """One reference a slice where the image is 4-D (x, y, z, t): a clip in time each. Else `ref` itself."""
    if ref.problem or ref.part.inside or not ref.images:
        return [ref]
    try:
        count = count_time_slices(ref.images[0])
        for mask in ref.masks if count else ():
            of_mask = count_time_slices(mask)
            if of_mask != count:
                has = f"has {of_mask} slices in time" if of_mask else "is not 4-D"
                raise CaseError(
                    f"{mask}: {has}, but its image {ref.images[0]} is 4-D with {count} slices in time; give a 4-D "
                    "mask of the same shape, or 3-D images."
                )
    except CaseError as error:
        return [replace(ref, problem=str(error))]
    return [_time_slice(ref, z) for z in range(count)] or [ref]


def _time_slice(ref: CaseRef, z: int) -> CaseRef:
    """The reference of one slice in time; a channel stays the end of the case's name."""
    suffix = "" if ref.part.channel is None else f"_{ref.part.channel:04d}"
    name = f"{ref.case_id.removesuffix(suffix)}_slice{z:03d}{suffix}"
    return replace(ref, case_id=name, part=replace(ref.part, time_slice=z))


def settle_channels(refs: Iterable[CaseRef]) -> list[CaseRef]:
    """What `settings.channels` makes of the channels of a case: each a case, the first alone, or three in one RGB."""
    kept, groups = [], defaultdict(list)
    for ref in refs:
        if ref.part.channel is None or ref.settings.channels == "each":
            kept.append(ref)
        else:
            groups[ref.dataset, ref.case_id.removesuffix(f"_{ref.part.channel:04d}")].append(ref)
    for (_, name), group in groups.items():
        ordered = sorted(group, key=lambda ref: ref.part.channel or 0)
        first = replace(ordered[0], case_id=name)
        kept.append(first if first.settings.channels == "first" else _folded(first, ordered))
    return kept


def _folded(first: CaseRef, ordered: list[CaseRef]) -> CaseRef:
    problem = next((ref.problem for ref in ordered if ref.problem), "")
    if len(ordered) != 3:
        problem = f"{first.images[0]}: channels: rgb needs 3 channels, found {len(ordered)}; choose each or first."
    images = tuple(dict.fromkeys(path for ref in ordered for path in ref.images))
    return replace(first, images=images, part=replace(first.part, channel=None, rgb=True), problem=problem)


def read_part(ref: CaseRef) -> Raster:
    """The image of a reference: its file, or the channels and the slice in time that `part` names."""
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
    """A mask of a reference, of the slice in time that `part` names."""
    if ref.part.time_slice is not None:
        labels = read_time_slice(path, ref.part.time_slice).array
        return MaskRaster(as_labels(labels, path)[None], path)
    return read_mask(path, ref.settings)


def load_listed(ref: CaseRef) -> Case:
    """The case of a reference whose files are plainly listed: its image (or part of it) under its masks."""
    image = with_stated_spacing(ref, read_part(ref))
    if ref.part.file_each:
        # each file is read when its turn comes: a hundred masks are never held at once; they carry the names
        structures = (_read_structure(ref, index) for index in range(len(ref.masks)))
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
    if not mask.exact:
        return replace(mask, labels=(Label(1, name),))
    values = present_values(mask.planes[0])
    return replace(mask, labels=tuple(Label(v, name if len(values) < 2 else f"{name}_{v}") for v in values))


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
    mask = read_part_mask(ref, ref.masks[index])
    return as_structure(replace(mask, planes=mask.planes.max(axis=0, keepdims=True)), ref.labels[index][1])


def as_structure(mask: MaskRaster, name: str) -> MaskRaster:
    """A mask as one structure: whatever is not 0; where values are not exact, `threshold` says what is foreground."""
    planes = (mask.planes > 0).astype(np.uint8) if mask.exact else mask.planes
    return replace(mask, planes=planes, labels=(Label(1, name),))
