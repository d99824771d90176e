"""Multi-frame DICOM (ultrasound, angiography, endoscopy) and colour stills, through pydicom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats import dicom_series
from medsam2.cases.formats.frames import grey_if_equal
from medsam2.cases.geometry import LPS_TO_RAS
from medsam2.cases.raster import MaskRaster, Raster, check_size
from medsam2.cases.settings import DatasetSettings

if TYPE_CHECKING:
    from pydicom import Dataset

NAME = "dicom_multiframe"
READS = "multi-frame and colour DICOM (ultrasound, endoscopy)"
WHOLE_SLIDE_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
UNIT_CM = 3


def recognises(path: Path) -> bool:
    header = dicom_series.read_image_header(path)
    return header is not None and (dicom_series.is_multiframe_or_colour(header) or dicom_series.is_enhanced(header))


def read(path: Path, settings: DatasetSettings) -> Raster:
    """Read all frames as uint8 (or native grey): [T, Y, X] if all channels are equal, else [T, Y, X, 3].

    Enhanced CT, MR and PET are read as volumes.

    Raises:
        CaseError: cut short, too large, or of an encoding without a decoder.
    """
    from pydicom.pixels import apply_color_lut

    header = dicom_series.read_header(path)
    if str(header.get("SOPClassUID", "")) == WHOLE_SLIDE_SOP_CLASS:
        raise CaseError(
            f"{path}: whole-slide tiles are not frames in time; export the whole slide or its regions as TIFF."
        )
    check_size(path, dicom_series.pixel_count(path, header) * 3 * 2)
    count = int(header.get("NumberOfFrames") or 1)
    if dicom_series.is_enhanced(header):
        return _read_enhanced(path)
    dataset, frames = dicom_series.read_stored(path)
    with dicom_series.explain_dicom(path):
        if frames.ndim < 4 and dataset.PhotometricInterpretation == "PALETTE COLOR":
            frames = apply_color_lut(frames, dataset)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            frames = dicom_series.invert_monochrome1(frames, dataset).astype(frames.dtype)
        seconds, (y, x) = _frame_interval(header), _pixel_spacing(header)
    frames = frames[None] if count == 1 else frames
    if frames.ndim == 4 and frames.dtype == np.uint16:
        frames = (frames >> 8).astype(np.uint8)  # palette colours have 16 bits
    is_clip = count > 1
    return Raster(grey_if_equal(frames), (seconds if is_clip else 1.0, y, x), path, moving=True)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    raise CaseError(f"{path}: a DICOM image is not a mask; give a DICOM-SEG, a mask video or a folder of mask frames.")


def _frame_interval(header: Dataset) -> float:
    """Return the time between frames in seconds; 1.0 if the header has none."""
    if header.get("FrameTime"):
        return float(header.FrameTime) / 1e3
    steps = [float(v) for v in header.get("FrameTimeVector") or [] if float(v) > 0]
    if steps:
        return float(np.median(steps)) / 1e3
    rate = header.get("CineRate") or header.get("RecommendedDisplayFrameRate")
    return 1.0 / float(rate) if rate else 1.0


def _pixel_spacing(header: Dataset) -> tuple[float, float]:
    """Return (y, x) in mm from PixelSpacing or the first calibrated ultrasound region; 1.0 if there is none."""
    if header.get("PixelSpacing"):
        y, x = (float(v) for v in header.PixelSpacing)
        return y, x
    for region in header.get("SequenceOfUltrasoundRegions") or []:
        if region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == UNIT_CM:
            y, x = (abs(float(region.get(key, 0))) * 10 for key in ("PhysicalDeltaY", "PhysicalDeltaX"))
            if x > 0 and y > 0:
                return y, x
    return 1.0, 1.0


def _read_enhanced(path: Path) -> Raster:
    """Read a volume in one file, whose functional groups give its affine and rescaling."""
    import highdicom

    fault = "the frames of this enhanced DICOM do not form a regular volume"
    with dicom_series.explain_dicom(path, fault, "export it as a series of slices or as NIfTI"):
        volume = highdicom.imread(path).get_volume()
    array = np.asarray(volume.array)
    if array.dtype.kind == "f" and np.array_equal(array, np.rint(array)):
        array = array.astype(np.int32)
    affine, spacing = volume_affine(np.asarray(volume.affine))
    return Raster(array, spacing, path, affine)


def volume_affine(affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Convert highdicom's affine (LPS; frame, row, column -> mm) to RAS+ of (x, y, z) and spacing (z, y, x) in mm."""
    reordered = affine[:, [2, 1, 0, 3]]
    z, y, x = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return np.asarray(LPS_TO_RAS @ reordered), (z, y, x)
