"""TotalSegmentator: a folder a subject with `ct.nii.gz` or `mri.nii.gz`, and one file a structure below it."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import monai_datalist
from medsam2.cases.layouts.manifest import has_manifest
from medsam2.cases.layouts.registry import CaseRef
from medsam2.cases.listing import FILE_EACH, load_listed, one_split

NAME = "totalsegmentator"
LOOKS_FOR = "SUBJECT/ct.nii.gz or SUBJECT/mri.nii.gz beside SUBJECT/segmentations/*.nii.gz"
IMAGES = {"ct.nii.gz": "CT", "mri.nii.gz": "MR"}
ENDING = ".nii.gz"

load = load_listed
"""The scan with all structures, packed into as few planes as they overlap."""


def recognise(path: Path) -> bool:
    """Whether one subject at least is complete: a stray folder `segmentations` alone says little."""
    if not path.is_dir() or has_manifest(path):
        return False
    if not (_complete(path) or any(_complete(child) for child in _folders(path))):
        return False
    return not monai_datalist.recognise(path)


def find(path: Path) -> list[CaseRef]:
    """One case a subject; what lacks its image or its structures is found too, and fails when read."""
    if _complete(path):
        return [_ref(path, path.absolute().parent.name, "")]
    splits = _splits(path / "meta.csv")
    subjects = [p for p in _folders(path) if _image(p) is not None or (p / "segmentations").is_dir()]
    return [_ref(subject, path.absolute().name, splits.get(subject.name, "")) for subject in sorted(subjects)]


def _ref(subject: Path, dataset: str, split: str) -> CaseRef:
    found = _image(subject)
    image = found or subject / "ct.nii.gz"
    folder = subject / "segmentations"
    masks = sorted(p for p in folder.glob(f"*{ENDING}") if not p.name.startswith(".")) if folder.is_dir() else []
    problem = "" if found else f"{image}: no such file (nor mri.nii.gz), but {folder} exists."
    if found and not masks:
        problem = f"{folder}: no file *{ENDING} in it; expected one a structure."
    return CaseRef(
        dataset=dataset,
        case_id=subject.absolute().name,
        patient_id=subject.absolute().name,
        layout=NAME,
        images=(image,),
        masks=tuple(masks),
        modality=IMAGES[image.name],
        labels=tuple(((number,), p.name.removesuffix(ENDING)) for number, p in enumerate(masks, start=1)),
        part=FILE_EACH,
        split=split,
        problem=problem,
    )


def _complete(folder: Path) -> bool:
    return _image(folder) is not None and (folder / "segmentations").is_dir()


def _image(folder: Path) -> Path | None:
    return next((folder / name for name in IMAGES if (folder / name).is_file()), None)


def _folders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return [Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]


def _splits(path: Path) -> dict[str, str]:
    """The split of each subject in `meta.csv` (columns behind `;`), where there is one.

    Raises:
        CaseError: the file cannot be read, or names an unknown split.
    """
    if not path.is_file():
        return {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter=";" if ";" in head else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CaseError(f"{path}: not readable as csv ({error}); mend or remove it.") from None
    return {
        row["image_id"]: one_split(row["split"], f"{path} line {line}")
        for line, row in enumerate(rows, start=2)
        if row.get("image_id") and row.get("split")
    }
