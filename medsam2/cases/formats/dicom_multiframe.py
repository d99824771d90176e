"""Multi-frame DICOM (ultrasound, angiography, endoscopy) and colour stills, through pydicom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.dicom_series import (
    explained,
    image_header,
    inverted,
    is_enhanced,
    is_frames,
    pixel_count,
    read_header,
    read_stored,
)
from medsam2.cases.formats.frames import grey_if_equal
from medsam2.cases.geometry import LPS_TO_RAS
from medsam2.cases.raster import MaskRaster, Raster, check_size
from medsam2.cases.settings import DatasetSettings

if TYPE_CHECKING:
    from pydicom import Dataset

NAME = "dicom_multiframe"
READS = "multi-frame and colour DICOM (ultrasound, endoscopy)"
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
CM = 3


def recognises(path: Path) -> bool:
    header = image_header(path)
    return header is not None and (is_frames(header) or is_enhanced(header))


def read(path: Path, settings: DatasetSettings) -> Raster:
    """All frames uint8 (or native grey), [T, Y, X] where all channels are equal, else [T, Y, X, 3].

    Enhanced CT, MR and PET become volumes.

    Raises:
        CaseError: cut short, too large, or of an encoding that no decoder here knows.
    """
    from pydicom.pixels import apply_color_lut

    header = read_header(path)
    if str(header.get("SOPClassUID", "")) == WHOLE_SLIDE:
        raise CaseError(f"{path}: tiles of a whole slide are no frames in time; export the slide, or regions, as TIFF.")
    check_size(path, pixel_count(path, header) * 3 * 2)
    count = int(header.get("NumberOfFrames") or 1)
    if is_enhanced(header):
        return _enhanced(path)
    dataset, frames = read_stored(path)
    with explained(path):
        if frames.ndim < 4 and dataset.PhotometricInterpretation == "PALETTE COLOR":
            frames = apply_color_lut(frames, dataset)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            frames = inverted(frames, dataset).astype(frames.dtype)
        seconds, (y, x) = _seconds(header), _pixel(header)
    frames = frames[None] if count == 1 else frames
    if frames.ndim == 4 and frames.dtype == np.uint16:
        frames = (frames >> 8).astype(np.uint8)  # palettes of 16 bits
    moving = count > 1
    return Raster(grey_if_equal(frames), (seconds if moving else 1.0, y, x), path, moving=True)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    raise CaseError(f"{path}: a DICOM image is no mask; give a DICOM-SEG, a mask video or a folder of mask frames.")


def _seconds(header: Dataset) -> float:
    """Between frames; 1.0 where the file does not say."""
    if header.get("FrameTime"):
        return float(header.FrameTime) / 1e3
    steps = [float(v) for v in header.get("FrameTimeVector") or [] if float(v) > 0]
    if steps:
        return float(np.median(steps)) / 1e3
    rate = header.get("CineRate") or header.get("RecommendedDisplayFrameRate")
    return 1.0 / float(rate) if rate else 1.0


def _pixel(header: Dataset) -> tuple[float, float]:
    """(y, x) in mm from the pixel spacing or the first calibrated ultrasound region; 1.0 where there is none."""
    if header.get("PixelSpacing"):
        y, x = (float(v) for v in header.PixelSpacing)
        return y, x
    for region in header.get("SequenceOfUltrasoundRegions") or []:
        if region.get("PhysicalUnitsXDirection") == CM and region.get("PhysicalUnitsYDirection") == CM:
            y, x = (abs(float(region.get(key, 0))) * 10 for key in ("PhysicalDeltaY", "PhysicalDeltaX"))
            if x > 0 and y > 0:
                return y, x
    return 1.0, 1.0


def _enhanced(path: Path) -> Raster:
    """A volume in one file, placed and rescaled by its functional groups."""
    import highdicom

    fault = "an enhanced DICOM whose frames make no regular volume"
    with explained(path, fault, "export it as a series of slices or as NIfTI"):
        volume = highdicom.imread(path).get_volume()
    array = np.asarray(volume.array)
    if array.dtype.kind == "f" and np.array_equal(array, np.rint(array)):
        array = array.astype(np.int32)
    affine, spacing = volume_affine(np.asarray(volume.affine))
    return Raster(array, spacing, path, affine)


def volume_affine(affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """highdicom's affine (LPS, index frame, row, column -> mm) as RAS+ of (x, y, z), and the spacing (z, y, x)."""
    turned = affine[:, [2, 1, 0, 3]]
    z, y, x = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return np.asarray(LPS_TO_RAS @ turned), (z, y, x)
