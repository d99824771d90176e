"""DICOM-SEG through highdicom: binary segments, overlapping or not, label maps, and fractional ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError, Label
from medsam2.cases.formats.dicom_multiframe import volume_affine
from medsam2.cases.formats.dicom_series import explained, is_dicom, pixel_count, read_header
from medsam2.cases.objects import pack
from medsam2.cases.raster import MaskRaster, Raster, check_size
from medsam2.cases.settings import DatasetSettings

if TYPE_CHECKING:
    import highdicom

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
    """Segments on the grid of the SEG itself, in as few planes as their overlaps allow.

    Raises:
        CaseError: cut short, too large, or frames that make no regular volume.
    """
    import highdicom

    check_size(path, pixel_count(path, read_header(path)))
    with explained(path, "not readable as DICOM-SEG", "copy or export it again"):
        seg = highdicom.seg.segread(path)
        fractional = seg.segmentation_type.value == "FRACTIONAL"
        names = {n: _name(seg, n) for n in seg.segment_numbers}
        parts = _segments(path, seg, fractional)
        first, affine = next(parts)
        if fractional:
            check_size(path, 4 * first.size * len(names))
            planes = np.stack([first, *(part for part, _ in parts)]).astype(np.float32, copy=False)
            labels = tuple(Label(1, name, plane) for plane, name in enumerate(names.values()))
        else:
            masks = itertools.chain((first,), (part for part, _ in parts))
            planes, labels = pack(zip(names.values(), masks, strict=True), None, lambda size: check_size(path, size))
    return MaskRaster(planes, path, affine, labels)


def _name(seg: highdicom.seg.Segmentation, number: int) -> str:
    return str(seg.get_segment_description(number).segment_label or "").strip() or f"segment_{number}"


def _segments(path: Path, seg: highdicom.seg.Segmentation, fractional: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """[Z, Y, X] of every segment with the affine, one at a time: a hundred on a large grid do not fit in memory.

    All come on the smallest grid that holds the frames of the whole file; frames that are not stored are empty.
    """
    geometry = seg.get_volume_geometry(allow_missing_positions=True)
    if geometry is None:
        raise CaseError(f"{path}: its frames make no regular volume; export it again, or as NIfTI.")
    _refuse_sparse(path, seg, float(geometry.spacing_between_slices))
    check_size(path, math.prod(geometry.spatial_shape) * (4 if fractional else 1))
    for number in seg.segment_numbers:
        volume = seg.get_volume(
            segment_numbers=[number],
            rescale_fractional=fractional,
            combine_segments=False,
            allow_missing_positions=True,
        )
        yield np.asarray(volume.array)[..., 0], volume_affine(np.asarray(volume.affine))[0]


def _refuse_sparse(path: Path, seg: highdicom.seg.Segmentation, step: float) -> None:
    """Refuse frames so far apart that slices between them were left out and nothing says how many.

    The step would be taken for the thickness of a slice, and labels would fill what lies between.
    """
    for groups in seg.get("SharedFunctionalGroupsSequence") or []:
        for measures in groups.get("PixelMeasuresSequence") or []:
            thickness = float(measures.get("SliceThickness") or 0)
            if "SpacingBetweenSlices" not in measures and 0 < 1.5 * thickness < step:
                raise CaseError(
                    f"{path}: its frames lie {step:g} mm apart, its slices are {thickness:g} mm thick, and it does not "
                    "say how many lie between (SpacingBetweenSlices); export it again with empty frames, or as NIfTI."
                )
