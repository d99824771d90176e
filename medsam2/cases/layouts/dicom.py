"""A tree of DICOM files: series of slices, multi-frame clips, and the DICOM-SEG objects that belong to them.

Headers alone decide what belongs together; folders may nest, and one folder may hold several series. A `DICOMDIR` is
ignored: it is an index that can point anywhere. Names of cases come from folders, never from the text of a header.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from medsam2.cases.assemble import assemble
from medsam2.cases.case import Case, CaseError, CaseRef
from medsam2.cases.formats import dicom_multiframe, dicom_seg, dicom_series
from medsam2.cases.formats.dicom_series import is_dicom, read_header
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.layouts.registry import layouts

if TYPE_CHECKING:
    from pydicom import Dataset

NAME = "dicom"
LOOKS_FOR = "a tree of DICOM files with DICOM-SEG objects in it"
DEPTH = 3
MODALITIES = {"CT": "CT", "MR": "MR", "PT": "PT", "US": "US", "IVUS": "US", "ES": "ENDOSCOPY", "SM": "PATHOLOGY"}
MODALITIES |= dict.fromkeys(("DX", "CR", "MG", "XA", "RF"), "XRAY")
STACKED = ("CT", "MR", "PT", "NM")
"""Modalities whose single-frame files are slices of a volume; those of others are stills of their own."""
NO_IMAGE = ("RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "ECG")
TAGS = [
    *("SOPClassUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ReferencedSeriesSequence", "SeriesNumber"),
    *("PatientID", "Modality", "Rows", "NumberOfFrames", "PhotometricInterpretation"),
]


@dataclass
class _Series:
    """What one case is made of. `header`: of its first file. `damaged`: a file of its folder that may belong to it."""

    header: Dataset
    files: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    damaged: Path | None = None

    @property
    def folder(self) -> Path:
        return Path(os.path.commonpath([file.parent for file in self.files]))


def recognise(path: Path) -> bool:
    """Whether DICOM lies at `path` or a few folders below it, and no other layout claims any of what is there."""
    folders = list(_walk(path, DEPTH)) if path.is_dir() else []
    if not any(_holds_dicom(folder, names) for folder, names in folders):
        return False
    others = [entry for name, entry in layouts().items() if name != NAME]
    return not any(entry.recognise(folder) for folder, _ in folders for entry in others)


def find(path: Path) -> list[CaseRef]:
    """One case a series or clip; what has no mask, and a mask without its image, are found too and fail when read."""
    series: dict[tuple[str, str], _Series] = {}
    segs: list[tuple[Path, Dataset]] = []
    damaged: list[Path] = []
    for file in _files(path):
        try:
            header = read_header(file, TAGS) if is_dicom(file) else None
        except CaseError:
            header = None
        if header is None or _is_cut(header):
            damaged.append(file)
        elif header.get("Modality") == "SEG":
            segs.append((file, header))
        elif "Rows" in header and header.get("Modality") not in NO_IMAGE:
            series.setdefault(_key(file, header), _Series(header)).files.append(file)
    found = sorted(series.values(), key=lambda s: s.files[0])
    orphans = [file for file, header in segs if not _attach(file, header, found)]
    lost = [file for file in damaged if not _blame(file, found)]
    names = _names(path, found)
    refs = [_ref(path, name, entry) for name, entry in zip(names, found, strict=True)]
    refs += [_without_image(path, file, _orphan(file)) for file in orphans]
    return refs + [_without_image(path, file, _cut(file)) for file in lost]


def load(ref: CaseRef) -> Case:
    """The series or clip with its segmentations.

    Raises:
        CaseError: what the formats raise, or a mask that does not fit its image.
    """
    first = ref.images[0]
    if len(ref.images) == 1 and dicom_multiframe.recognises(first):
        image = dicom_multiframe.read(first, ref.settings)
    else:
        image = dicom_series.read_files(ref.images, ref.settings)
    masks = [dicom_seg.read_mask(mask, ref.settings) for mask in ref.masks]
    return assemble(ref, image, masks)


def _walk(root: Path, depth: int | None = None) -> Iterator[tuple[Path, list[str]]]:
    """`root` and the folders below it, each with the names in it but hidden ones; links are not followed."""
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), sorted(name for name in files if not name.startswith(".")) + folders
        if depth is not None and len(Path(place).relative_to(root).parts) >= depth:
            folders.clear()


def _holds_dicom(folder: Path, names: list[str]) -> bool:
    """Whether files there are DICOM, or claim to be: damaged ones are cases that fail."""
    claiming = (folder / name for name in names if name.lower().endswith(".dcm"))
    return any(path.is_file() for path in claiming) or dicom_series.recognises(folder)


def _files(root: Path) -> Iterator[Path]:
    """Files that are DICOM or claim to be by their ending; what links lead to outside of `root` is left out."""
    inside = root.resolve()
    for folder, names in _walk(root):
        for path in (folder / name for name in names):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                warnings.warn(f"{path}: a link that leads out of {root}; it was not followed.", CaseWarning, 3)
            elif path.is_file() and (path.suffix.lower() == ".dcm" or is_dicom(path)):
                yield path


def _is_cut(header: Dataset) -> bool:
    """Whether the file says that it is an image and ends before the size of that image."""
    kind = header.file_meta.get("MediaStorageSOPClassUID") or header.get("SOPClassUID")
    says_image = kind is None or "Image Storage" in kind.name or "Segmentation" in kind.name
    return says_image and ("Rows" not in header or "Modality" not in header)


def _text(header: Dataset, key: str) -> str:
    value = header.get(key)
    return "" if value is None else str(value).strip()


def _key(file: Path, header: Dataset) -> tuple[str, str]:
    """What the files of one case have in common: their series; a clip and a still are cases of their own."""
    modality = _text(header, "Modality")
    alone = modality not in STACKED or dicom_series.is_multiframe_or_colour(header) or dicom_series.is_enhanced(header)
    return _text(header, "SeriesInstanceUID") or str(file.parent), str(file) if alone else ""


def _attach(seg: Path, header: Dataset, series: Sequence[_Series]) -> bool:
    """Give a segmentation to the series that it names, else to the only one in its frame of reference."""
    listed = [_text(entry, "SeriesInstanceUID") for entry in header.get("ReferencedSeriesSequence") or []]
    named, place = {uid for uid in listed if uid}, _text(header, "FrameOfReferenceUID")
    owners = [entry for entry in series if _text(entry.header, "SeriesInstanceUID") in named]
    if not named and place:
        owners = [entry for entry in series if _text(entry.header, "FrameOfReferenceUID") == place]
        near = [entry for entry in owners if entry.folder == seg.parent]
        owners = owners if len(owners) == 1 else near if len(near) == 1 else []
    for owner in owners:
        owner.masks.append(seg)
    return bool(owners)


def _blame(file: Path, series: Sequence[_Series]) -> bool:
    """A damaged file may be a slice of any series in its folder: none of these can be trusted to be whole."""
    near = [entry for entry in series if any(other.parent == file.parent for other in entry.files)]
    for entry in near:
        entry.damaged = entry.damaged or file
    return bool(near)


def _names(root: Path, series: Sequence[_Series]) -> list[str]:
    """One name a series: its folder, and the number of the series where several share it."""
    names: list[str] = []
    folders = [entry.folder for entry in series]
    for index, entry in enumerate(series):
        relative = entry.folder.relative_to(root).as_posix()
        name = root.absolute().name if relative == "." else relative
        if folders.count(entry.folder) > 1:
            counter = folders[: index + 1].count(entry.folder)
            number = _text(entry.header, "SeriesNumber")
            name += f"-series{number if number.isdecimal() else counter}"
        again = sum(other == name or other.startswith(f"{name}-part") for other in names)
        names.append(f"{name}-part{again + 1}" if again else name)
    return names


def _ref(root: Path, name: str, entry: _Series) -> CaseRef:
    problem = ""
    if entry.damaged:
        problem = _cut(entry.damaged)
    elif not entry.masks:
        problem = (
            f"{entry.files[0]}: no mask was found for its series of {len(entry.files)} files; put the DICOM-SEG that "
            "refers to it into the same tree, or name a mask file in a manifest.csv."
        )
    return CaseRef(
        root.absolute().name,
        name,
        _text(entry.header, "PatientID"),
        images=tuple(sorted(entry.files)),
        masks=tuple(sorted(entry.masks)),
        modality=MODALITIES.get(_text(entry.header, "Modality"), ""),
        problem=problem,
    )


def _without_image(root: Path, file: Path, problem: str) -> CaseRef:
    return CaseRef(root.absolute().name, file.relative_to(root).as_posix(), images=(file,), problem=problem)


def _orphan(path: Path) -> str:
    return (
        f"{path}: a DICOM-SEG whose image series is not in this tree, or not told apart from others; put the series "
        "that it refers to into the same tree, or name both in a manifest.csv."
    )


def _cut(path: Path) -> str:
    return (
        f"{path}: not readable as DICOM: found {path.stat().st_size} bytes, expected a header with the size of the "
        "image and its pixels; it may be a slice of a series here. Copy it again, or remove it."
    )
