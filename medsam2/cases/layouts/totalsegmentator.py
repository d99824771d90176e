"""TotalSegmentator: one folder per subject with `ct.nii.gz` or `mri.nii.gz`, and one file per structure below it."""

from __future__ import annotations

import csv
from pathlib import Path

from medsam2.cases.case import CaseError, CaseRef, Part
from medsam2.cases.listing import SPLITS, list_folders, list_visible
from medsam2.cases.raster import explain

NAME = "totalsegmentator"
LOOKS_FOR = "SUBJECT/ct.nii.gz or SUBJECT/mri.nii.gz beside SUBJECT/segmentations/*.nii.gz"
IMAGE_MODALITIES = {"ct.nii.gz": "CT", "mri.nii.gz": "MR"}
YIELDS_TO = ("monai_datalist",)
ENDING = ".nii.gz"


def recognise(path: Path) -> bool:
    """Whether at least one subject is complete; a folder `segmentations` without image is no evidence."""
    return path.is_dir() and any(_complete(folder) for folder in (path, *list_folders(path)))


def find(path: Path) -> list[CaseRef]:
    """List one case per subject. Subjects without image or structures are listed, and fail when read."""
    if _complete(path):
        return [_ref(path, path.absolute().parent.name, "")]
    splits = _splits(path / "meta.csv")
    subjects = [p for p in list_folders(path) if _image(p) is not None or (p / "segmentations").is_dir()]
    return [_ref(subject, path.absolute().name, splits.get(subject.name, "")) for subject in subjects]


def _ref(subject: Path, dataset: str, split: str) -> CaseRef:
    image, folder = _image(subject), subject / "segmentations"
    masks = [path for path in list_visible(folder) if path.name.endswith(ENDING)] if folder.is_dir() else []
    problem = "" if masks else f"{folder}: holds no file *{ENDING}; expected one per structure."
    if image is None:
        image = subject / "ct.nii.gz"
        problem = f"{image}: no such file (nor mri.nii.gz), but {folder} exists."
    return CaseRef(
        dataset,
        subject.absolute().name,
        images=(image,),
        masks=tuple(masks),
        modality=IMAGE_MODALITIES[image.name],
        labels=tuple(((number,), path.name.removesuffix(ENDING)) for number, path in enumerate(masks, start=1)),
        part=Part(file_per_structure=True),
        split=split,
        problem=problem,
    )


def _complete(folder: Path) -> bool:
    return _image(folder) is not None and (folder / "segmentations").is_dir()


def _image(folder: Path) -> Path | None:
    return next((folder / name for name in IMAGE_MODALITIES if (folder / name).is_file()), None)


def _splits(path: Path) -> dict[str, str]:
    """Read the split of each subject from `meta.csv` (separated by `;`), if it exists.

    Raises:
        CaseError: the file cannot be read, or contains an unknown split.
    """
    if not path.is_file():
        return {}
    with explain(path, "not readable as csv", "correct or remove it"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = list(csv.DictReader(lines, delimiter=";" if ";" in "".join(lines[:1]) else ","))
    for line, row in enumerate(rows, start=2):
        if (row.get("split") or "").strip().lower() not in ("", *SPLITS):
            raise CaseError(f"{path} line {line}: split {row['split']!r} is not one of train, val, test.")
    return {row.get("image_id") or "": SPLITS.get((row.get("split") or "").strip().lower(), "") for row in rows}
