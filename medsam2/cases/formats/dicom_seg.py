"""DICOM-SEG through highdicom: binary segments, overlapping or not, label maps, and fractional ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.dicom_multiframe import volume_affine
from medsam2.cases.formats.dicom_series import is_dicom, read_header
from medsam2.cases.formats.limits import MAX_BYTES, check_size
from medsam2.cases.raster import MaskRaster, Raster
from medsam2.cases.settings import DatasetSettings

NAME = "dicom_seg"
READS = "DICOM-SEG"


def recognises(path: Path) -> bool:
    if not is_dicom(path):
        return False
    try:
        return bool(read_header(path, ["Modality"]).get("Modality") == "SEG")
    except CaseError:
        return False


def read(path: Path, settings: DatasetSettings) -> Raster:
    raise CaseError(f"{path}: a DICOM-SEG is a mask, not an image; give the series that it belongs to.")


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """Segments on the grid of the SEG itself, in as few planes as their overlaps allow; values are segment numbers.

    Raises:
        CaseError: cut short, too large, or frames that make no regular volume.
    """
    import highdicom

    header = read_header(path)
    try:
        size = int(header.Rows) * int(header.Columns) * int(header.get("NumberOfFrames") or 1)
    except (AttributeError, TypeError, ValueError):
        raise CaseError(f"{path}: cut short before the size of its frames; copy it again.") from None
    check_size(path, size, MAX_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes values of the file
            seg = highdicom.seg.segread(path)
            fractional = seg.segmentation_type.value == "FRACTIONAL"
            names = {n: str(seg.get_segment_description(n).segment_label) for n in seg.segment_numbers}
            # one channel a segment, on the smallest grid that holds all frames; frames that are not stored are empty
            volume = seg.get_volume(rescale_fractional=fractional, combine_segments=False)
    except Exception as error:  # highdicom and pydicom raise many kinds
        raise CaseError(
            f"{path}: not readable as DICOM-SEG ({type(error).__name__} in its {path.stat().st_size} bytes); copy or "
            "export it again."
        ) from None
    affine, _ = volume_affine(np.asarray(volume.affine))
    array: Any = np.asarray(volume.array)  # [Z, Y, X, segment]
    if fractional:
        labels = tuple((plane, 1, names[n]) for plane, n in enumerate(seg.segment_numbers))
        return MaskRaster(np.moveaxis(array, -1, 0).astype(np.float32), path, affine, labels)
    planes, labels = _packed(array, list(seg.segment_numbers), names)
    return MaskRaster(planes, path, affine, labels)


def _packed(
    array: np.ndarray, numbers: list[int], names: dict[int, str]
) -> tuple[np.ndarray, tuple[tuple[int, int, str], ...]]:
    """[Z, Y, X, S] of 0 and 1 as planes [P, Z, Y, X]: a segment goes to the first plane where it meets no other."""
    kind = np.uint8 if max(numbers) < 256 else np.uint16
    planes: list[np.ndarray] = []
    labels = []
    for index, number in enumerate(numbers):
        found = array[..., index] != 0
        home = next((p for p, plane in enumerate(planes) if not plane[found].any()), None)
        if home is None:
            home = len(planes)
            planes.append(np.zeros(array.shape[:3], kind))
        planes[home][found] = number
        labels.append((home, number, names[number]))
    return np.stack(planes), tuple(labels)
