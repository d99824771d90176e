"""DICOM-SEG through highdicom: binary segments, which may overlap, label maps, and fractional segments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError, Label
from medsam2.cases.formats.dicom_multiframe import volume_affine
from medsam2.cases.formats.dicom_series import explain_dicom, is_dicom, pixel_count, read_header
from medsam2.cases.objects import pack
from medsam2.cases.raster import MaskRaster, Raster, check_size
from medsam2.cases.settings import DatasetSettings

if TYPE_CHECKING:
    import highdicom

NAME = "dicom_seg"
READS = "DICOM-SEG"


def recognises(path: Path) -> bool:
    with suppress(CaseError):
        return is_dicom(path) and bool(read_header(path, ["Modality"]).get("Modality") == "SEG")
    return False


def read(path: Path, settings: DatasetSettings) -> Raster:
    raise CaseError(f"{path}: a DICOM-SEG is a mask, not an image; give the series that it refers to.")


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """Read the segments on the grid of the SEG, in as few planes as their overlaps allow.

    Raises:
        CaseError: cut short, too large, or the frames do not form a regular volume.
    """
    import highdicom

    check_size(path, pixel_count(path, read_header(path)))
    with explain_dicom(path, "not readable as DICOM-SEG", "copy or export it again"):
        seg = highdicom.seg.segread(path)
        fractional = seg.segmentation_type.value == "FRACTIONAL"
        names = {n: _name(seg, n) for n in seg.segment_numbers}
        segments = _segments(path, seg, fractional)
        first_mask, affine = next(segments)
        if fractional:
            check_size(path, 4 * first_mask.size * len(names))
            planes = np.stack([first_mask, *(segment for segment, _ in segments)]).astype(np.float32, copy=False)
            labels = tuple(Label(1, name, plane) for plane, name in enumerate(names.values()))
        else:
            masks = itertools.chain((first_mask,), (segment for segment, _ in segments))
            planes, labels = pack(zip(names.values(), masks, strict=True), None, lambda size: check_size(path, size))
    return MaskRaster(planes, path, affine, labels)


def _name(seg: highdicom.seg.Segmentation, number: int) -> str:
    return str(seg.get_segment_description(number).segment_label or "").strip() or f"segment_{number}"


def _segments(path: Path, seg: highdicom.seg.Segmentation, fractional: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield [Z, Y, X] and the affine of each segment; all of them together may not fit in memory.

    All segments share the smallest grid that holds the frames of the file; frames that are not stored are empty.
    """
    geometry = seg.get_volume_geometry(allow_missing_positions=True)
    if geometry is None:
        raise CaseError(f"{path}: its frames do not form a regular volume; export it again, or as NIfTI.")
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
    """Refuse frames between which an unknown number of slices is missing.

    The step would be taken for the slice thickness, and labels would fill the gaps.
    """
    for groups in seg.get("SharedFunctionalGroupsSequence") or []:
        for measures in groups.get("PixelMeasuresSequence") or []:
            thickness = float(measures.get("SliceThickness") or 0)
            if "SpacingBetweenSlices" not in measures and 0 < 1.5 * thickness < step:
                raise CaseError(
                    f"{path}: its frames lie {step:g} mm apart, its slices are {thickness:g} mm thick, and "
                    "SpacingBetweenSlices is missing; export it again with empty frames, or as NIfTI."
                )
