"""A tree of DICOM files: series of slices, multi-frame clips, and their DICOM-SEG objects.

Only headers decide which files belong together; folders may nest, and a folder may hold several series. A `DICOMDIR`
is ignored, because it can point to any file. Names of cases come from folders, never from the text of a header.
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
MAX_RECOGNITION_DEPTH = 3  # folders below the source
MODALITIES = {"CT": "CT", "MR": "MR", "PT": "PT", "US": "US", "IVUS": "US", "ES": "ENDOSCOPY", "SM": "PATHOLOGY"}
MODALITIES |= dict.fromkeys(("DX", "CR", "MG", "XA", "RF"), "XRAY")
VOLUME_MODALITIES = ("CT", "MR", "PT", "NM")
"""Modalities with single-frame files that are slices of a volume; in other modalities they are separate stills."""
NON_IMAGE_MODALITIES = ("RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "ECG")
HEADER_TAGS = [
    *("SOPClassUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ReferencedSeriesSequence", "SeriesNumber"),
    *("PatientID", "Modality", "Rows", "NumberOfFrames", "PhotometricInterpretation"),
]


@dataclass
class _Series:
    """The files of one case, the header of the first, and a damaged file in the folder that may belong to it."""

    header: Dataset
    files: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    damaged: Path | None = None

    @property
    def folder(self) -> Path:
        return Path(os.path.commonpath([file.parent for file in self.files]))


def recognise(path: Path) -> bool:
    """Whether `path` or a folder shortly below it holds DICOM, and no other layout recognises any of these folders."""
    folders = list(_walk(path, MAX_RECOGNITION_DEPTH)) if path.is_dir() else []
    if not any(_holds_dicom(folder, names) for folder, names in folders):
        return False
    others = [entry for name, entry in layouts().items() if name != NAME]
    return not any(entry.recognise(folder) for folder, _ in folders for entry in others)


def find(path: Path) -> list[CaseRef]:
    """List one case per series or clip. Images without mask and masks without image are listed, and fail when read."""
    series: dict[tuple[str, str], _Series] = {}
    segs: list[tuple[Path, Dataset]] = []
    damaged: list[Path] = []
    for file in _files(path):
        try:
            header = read_header(file, HEADER_TAGS) if is_dicom(file) else None
        except CaseError:
            header = None
        if header is None or _is_truncated(header):
            damaged.append(file)
        elif header.get("Modality") == "SEG":
            segs.append((file, header))
        elif "Rows" in header and header.get("Modality") not in NON_IMAGE_MODALITIES:
            series.setdefault(_series_key(file, header), _Series(header)).files.append(file)
    cases = sorted(series.values(), key=lambda s: s.files[0])
    orphans = [file for file, header in segs if not _attach_seg(file, header, cases)]
    unassigned = [file for file in damaged if not _mark_damaged(file, cases)]
    refs = [_ref(path, name, entry) for name, entry in zip(_names(path, cases), cases, strict=True)]
    refs += [_ref_without_image(path, file, _orphan_message(file)) for file in orphans]
    return refs + [_ref_without_image(path, file, _damage_message(file)) for file in unassigned]


def load(ref: CaseRef) -> Case:
    """Load the series or clip with its segmentations.

    Raises:
        CaseError: a format refuses a file, or a mask does not fit its image.
    """
    first = ref.images[0]
    if len(ref.images) == 1 and dicom_multiframe.recognises(first):
        image = dicom_multiframe.read(first, ref.settings)
    else:
        image = dicom_series.read_files(ref.images, ref.settings)
    masks = [dicom_seg.read_mask(mask, ref.settings) for mask in ref.masks]
    return assemble(ref, image, masks)


def _walk(root: Path, depth: int | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Yield `root` and the folders below it, with the names of visible entries; links are not followed."""
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), sorted(name for name in files if not name.startswith(".")) + folders
        if depth is not None and len(Path(place).relative_to(root).parts) >= depth:
            folders.clear()


def _holds_dicom(folder: Path, names: list[str]) -> bool:
    """Whether the folder holds DICOM files, or damaged ones with the ending .dcm."""
    dcm_files = (folder / name for name in names if name.lower().endswith(".dcm"))
    return any(path.is_file() for path in dcm_files) or dicom_series.recognises(folder)


def _files(root: Path) -> Iterator[Path]:
    """Yield files that are DICOM or end in .dcm; links that lead out of `root` are skipped with a warning."""
    resolved_root = root.resolve()
    for folder, names in _walk(root):
        for path in (folder / name for name in names):
            if path.is_symlink() and not path.resolve().is_relative_to(resolved_root):
                warnings.warn(f"{path}: the link leads out of {root} and was not followed.", CaseWarning, 3)
            elif path.is_file() and (path.suffix.lower() == ".dcm" or is_dicom(path)):
                yield path


def _is_truncated(header: Dataset) -> bool:
    """Whether the header declares an image, but the file ends before the size of the image."""
    kind = header.file_meta.get("MediaStorageSOPClassUID") or header.get("SOPClassUID")
    is_image = kind is None or "Image Storage" in kind.name or "Segmentation" in kind.name
    return is_image and ("Rows" not in header or "Modality" not in header)


def _text(header: Dataset, key: str) -> str:
    value = header.get(key)
    return "" if value is None else str(value).strip()


def _series_key(file: Path, header: Dataset) -> tuple[str, str]:
    """Return the key shared by the files of a case: the series; a clip or still adds its file, to be its own case."""
    modality = _text(header, "Modality")
    single_file = (
        modality not in VOLUME_MODALITIES
        or dicom_series.is_multiframe_or_colour(header)
        or dicom_series.is_enhanced(header)
    )
    return _text(header, "SeriesInstanceUID") or str(file.parent), str(file) if single_file else ""


def _attach_seg(seg: Path, header: Dataset, series: Sequence[_Series]) -> bool:
    """Attach a segmentation to the series that it references, else to the only one in its frame of reference."""
    uids = [_text(entry, "SeriesInstanceUID") for entry in header.get("ReferencedSeriesSequence") or []]
    referenced, frame_uid = {uid for uid in uids if uid}, _text(header, "FrameOfReferenceUID")
    owners = [entry for entry in series if _text(entry.header, "SeriesInstanceUID") in referenced]
    if not referenced and frame_uid:
        owners = [entry for entry in series if _text(entry.header, "FrameOfReferenceUID") == frame_uid]
        same_folder = [entry for entry in owners if entry.folder == seg.parent]
        owners = owners if len(owners) == 1 else same_folder if len(same_folder) == 1 else []
    for owner in owners:
        owner.masks.append(seg)
    return bool(owners)


def _mark_damaged(file: Path, series: Sequence[_Series]) -> bool:
    """Mark every series in the folder of a damaged file as possibly incomplete; return whether there is one."""
    same_folder = [entry for entry in series if any(other.parent == file.parent for other in entry.files)]
    for entry in same_folder:
        entry.damaged = entry.damaged or file
    return bool(same_folder)


def _names(root: Path, series: Sequence[_Series]) -> list[str]:
    """Name each series after its folder, with the number of the series if several share the folder."""
    names: list[str] = []
    folders = [entry.folder for entry in series]
    for index, entry in enumerate(series):
        relative = entry.folder.relative_to(root).as_posix()
        name = root.absolute().name if relative == "." else relative
        if folders.count(entry.folder) > 1:
            counter = folders[: index + 1].count(entry.folder)
            number = _text(entry.header, "SeriesNumber")
            name += f"-series{number if number.isdecimal() else counter}"
        repeats = sum(other == name or other.startswith(f"{name}-part") for other in names)
        names.append(f"{name}-part{repeats + 1}" if repeats else name)
    return names


def _ref(root: Path, name: str, entry: _Series) -> CaseRef:
    problem = ""
    if entry.damaged:
        problem = _damage_message(entry.damaged)
    elif not entry.masks:
        problem = (
            f"{entry.files[0]}: its series of {len(entry.files)} files has no mask; put the DICOM-SEG that "
            "references it into the same tree, or name a mask file in a manifest.csv."
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


def _ref_without_image(root: Path, file: Path, problem: str) -> CaseRef:
    return CaseRef(root.absolute().name, file.relative_to(root).as_posix(), images=(file,), problem=problem)


def _orphan_message(path: Path) -> str:
    return (
        f"{path}: the image series of this DICOM-SEG is missing in this tree or ambiguous; put the series that "
        "it references into the same tree, or name both in a manifest.csv."
    )


def _damage_message(path: Path) -> str:
    return (
        f"{path}: not readable as DICOM: its {path.stat().st_size} bytes lack a header with the size of the image, or "
        "the pixels; it may be a slice of a series in this folder. Copy it again, or remove it."
    )
