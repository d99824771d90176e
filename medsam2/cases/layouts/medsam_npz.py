"""MedSAM and MedSAM2: a folder of npz files with `imgs` and `gts`; modality and patient are in the file's name."""

from __future__ import annotations

import re
from pathlib import Path

from medsam2.cases.case import Case, Label
from medsam2.cases.formats.npz import array_names, read_npz
from medsam2.cases.layouts.registry import CaseRef
from medsam2.cases.values import present_values

NAME = "medsam_npz"
LOOKS_FOR = "*.npz with the arrays imgs and gts"

# DeepLesion: CT_Lesion_<patient>_<study>_<series>_<first slice>-<last slice>; one patient has many files
DEEPLESION = re.compile(r"^[A-Z]+_Lesion_(?P<patient>\d{6})_\d{2}_\d{2}_\d+-\d+$")
PREFIXES = {
    "CT": "CT", "MR": "MR", "MRI": "MR", "PET": "PT", "PT": "PT", "US": "US", "ENDO": "ENDOSCOPY",
    "ENDOSCOPY": "ENDOSCOPY", "XRAY": "XRAY", "X-RAY": "XRAY", "MICROSCOPY": "MICROSCOPY", "PATHOLOGY": "PATHOLOGY",
}  # fmt: skip


def recognise(path: Path) -> bool:
    files = [path] if path.is_file() else _npz_files(path)
    return any(file.suffix == ".npz" and {"imgs", "gts"} <= set(array_names(file)) for file in files)


def find(path: Path) -> list[CaseRef]:
    return [_ref(file) for file in ([path] if path.is_file() else _npz_files(path))]


def patient_of(stem: str) -> str:
    """The patient in a DeepLesion name (`CT_Lesion_000015_01_01_081-093` -> `000015`), else the whole name."""
    match = DEEPLESION.match(stem)
    return match["patient"] if match else stem


def load(ref: CaseRef) -> Case:
    """The voxels as they are stored: axis 0 are the slices, nothing is turned."""
    volume = read_npz(ref.images[0])
    values = present_values(volume.mask)
    lesion = "lesion" in ref.case_id.lower()
    labels = [Label(value, "lesion" if lesion else f"label_{value}") for value in values]
    return ref.case(volume.image, volume.mask[None], labels, volume.spacing, affine=volume.affine)


def _ref(file: Path) -> CaseRef:
    prefix = re.split(r"[_\s]", file.stem, maxsplit=1)[0].upper()
    return CaseRef(
        dataset=file.absolute().parent.name,
        case_id=file.stem,
        patient_id=patient_of(file.stem),
        layout=NAME,
        images=(file,),
        masks=(),
        modality=PREFIXES.get(prefix, ""),
    )


def _npz_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.npz") if p.is_file() and not p.name.startswith("."))
