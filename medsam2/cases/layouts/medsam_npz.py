"""MedSAM and MedSAM2: a folder of npz files with `imgs` and `gts`; the file's name gives modality and patient.

An array `recist` [T, H, W] holds drawn diameters: the pixels of value v on a slice draw the diameter of lesion v.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from medsam2.cases.assemble import assemble
from medsam2.cases.case import Case, CaseError, CaseRef, Label
from medsam2.cases.formats.npz import array_names, read_arrays, read_npz
from medsam2.cases.listing import list_visible, modality_of
from medsam2.cases.values import present_values

NAME = "medsam_npz"
LOOKS_FOR = "*.npz with the arrays imgs and gts"

# DeepLesion: CT_Lesion_<patient>_<study>_<series>_<first slice>-<last slice>; one patient has many files
DEEPLESION = re.compile(r"^[A-Z]+_Lesion_(?P<patient>\d{6})_\d{2}_\d{2}_\d+-\d+$")


def recognise(path: Path) -> bool:
    return any({"imgs", "gts"} <= set(array_names(file)) for file in _npz_files(path))


def find(path: Path) -> list[CaseRef]:
    return [_ref(file) for file in _npz_files(path)]


def patient_of(stem: str) -> str:
    """Return the patient in a DeepLesion name (`000015` in `CT_Lesion_000015_01_01_081-093`), else the whole name."""
    match = DEEPLESION.match(stem)
    return match["patient"] if match else stem


def load(ref: CaseRef) -> Case:
    """Load the voxels as they are stored: axis 0 holds the slices, without reorientation."""
    path = ref.images[0]
    image, mask = read_npz(path)
    present = present_values(mask.planes[0])
    lesion = "lesion" if "lesion" in ref.case_id.lower() else ""
    mask = replace(mask, labels=tuple(Label(value, lesion or f"label_{value}") for value in present))
    if "recist" in array_names(path):
        markers, shape = read_arrays(path, ("recist",))["recist"], mask.planes.shape[1:]
        if markers.ndim == 2:
            markers = markers[None]
        if markers.shape != shape or markers.dtype.kind not in "iub":
            raise CaseError(
                f"{path}: recist is {markers.dtype} {markers.shape}; expected integers of shape {shape}, as gts."
            )
        ref = replace(ref, recist=_fit_lines(markers, present, lesion))
    return assemble(ref, image, [mask], turn=False)


def _fit_lines(
    markers: np.ndarray, present: list[int], lesion: str
) -> tuple[tuple[int, float, float, float, float, str], ...]:
    """Return (slice, x0, y0, x1, y1, label) per value and slice: the two pixels that are farthest apart."""
    lines = []
    for index, part in enumerate(markers):
        for value in np.unique(part[part > 0]).tolist() if part.any() else []:
            (y0, x0), (y1, x1) = farthest_pair(np.argwhere(part == value))
            # with a single lesion, a line of another value belongs to it
            label = int(value) if value in present or len(present) != 1 else present[0]
            lines.append((index, float(x0), float(y0), float(x1), float(y1), lesion or f"label_{label}"))
    return tuple(lines)


def farthest_pair(pixels: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the two pixels of [N, (y, x)], sorted by row, that are farthest apart; upper (then left) first."""
    rows = pixels[:, 0]
    # only the first and last pixel of a row can end the longest line
    first = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
    last = np.r_[first[1:] - 1, rows.size - 1]
    ends = pixels[np.unique(np.r_[first, last])].astype(np.int64)
    distances = ((ends[:, None] - ends[None]) ** 2).sum(axis=-1)
    one, other = np.unravel_index(int(distances.argmax()), distances.shape)
    (y0, x0), (y1, x1) = sorted((tuple(ends[one].tolist()), tuple(ends[other].tolist())))
    return (y0, x0), (y1, x1)


def _ref(file: Path) -> CaseRef:
    modality = modality_of(re.split(r"[_\s]", file.stem, maxsplit=1)[0])
    return CaseRef(file.absolute().parent.name, file.stem, patient_of(file.stem), images=(file,), modality=modality)


def _npz_files(path: Path) -> list[Path]:
    files = list_visible(path) if path.is_dir() else [path]
    return [file for file in files if file.suffix == ".npz" and file.is_file()]
