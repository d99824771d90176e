"""DICOM series of single-frame slices (CT, MR, PET): a folder, or the files of one series, through pydicom."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.geometry import LPS_TO_RAS, CaseWarning
from medsam2.cases.raster import MaskRaster, Raster, check_readable, check_size, explain
from medsam2.cases.settings import DatasetSettings

if TYPE_CHECKING:
    from pydicom import Dataset

NAME = "dicom_series"
READS = "DICOM series (a folder of slices)"
PREAMBLE_BYTES = 132
HEADER_TAGS = (
    *("SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "BitsStored"),
    *("PixelRepresentation", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber"),
    *("SpacingBetweenSlices", "SliceThickness", "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"),
    *("FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate", "SequenceOfUltrasoundRegions"),
)
"""Every tag that the DICOM readers use; none of them holds a name or a free text."""
STORAGE_UID_PREFIX = "1.2.840.10008.5.1.4.1.1."
ENHANCED_SOP_CLASSES = tuple(STORAGE_UID_PREFIX + kind for kind in ("2.1", "4.1", "130", "2.2", "4.4", "128.1"))
"""Enhanced and Legacy Converted CT, MR and PET: one file per volume, whose geometry lies in functional groups."""
MAX_OPENED_FILES = 10
"""Number of files of a folder that are opened to find out whether it holds slices."""
STEP_TOLERANCE_MM = 0.01
"""Steps between slices may differ by this and 1 %; the second covers rounded positions in the header."""


@dataclass(frozen=True, eq=False)
class _Slice:
    path: Path
    header: Dataset
    position: float  # along the normal in mm; the instance number if the series has no positions


def is_dicom(path: Path) -> bool:
    """Return whether a file has the DICOM prefix after its preamble and is not a DICOMDIR, an index of other files."""
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(PREAMBLE_BYTES)[128:] == b"DICM"
    except OSError:
        return False


def dicom_files(folder: Path) -> list[Path]:
    """List the DICOM files directly in a folder, sorted by name."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and is_dicom(p))


def read_header(path: Path, tags: Sequence[str] | None = None) -> Dataset:
    """Read `tags`, or all of `HEADER_TAGS`, and decode them here, where pydicom's warnings are silenced.

    Raises:
        CaseError: not DICOM, or cut short; the message holds no text of the file.
    """
    import pydicom

    check_readable(path)
    with explain_dicom(path, "not readable as DICOM", "copy it again"):
        names: Any = list(tags or HEADER_TAGS)
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=names)
        for _ in header.iterall():
            pass
        return header


@contextmanager
def explain_dicom(
    path: Path,
    fault: str = "a header value is not of the type that DICOM requires",
    remedy: str = "export it again",
) -> Iterator[None]:
    """Turn any error into a `CaseError` without its text, which may quote a patient's data from the header."""
    with explain(path, fault, remedy, quote=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom quotes header values
        warnings.simplefilter("always", CaseWarning)  # ours hold no header values
        yield


def pixel_count(path: Path, header: Dataset) -> int:
    """Return rows times columns times frames as stated by the header.

    Raises:
        CaseError: one of them is missing or invalid.
    """
    fault = "cut short, or its header lacks a valid number of rows, columns or frames"
    with explain_dicom(path, fault, "copy or export it again"):
        return int(header.Rows) * int(header.Columns) * int(header.get("NumberOfFrames") or 1)


def is_enhanced(header: Dataset) -> bool:
    """Return whether one file holds a whole volume (enhanced CT, MR or PET)."""
    return str(header.get("SOPClassUID", "")) in ENHANCED_SOP_CLASSES


def is_multiframe_or_colour(header: Dataset) -> bool:
    """Return whether a file holds several frames or colours, and is therefore not a slice of a series."""
    return _is_multiframe(header) or not str(header.get("PhotometricInterpretation", "MONO")).startswith("MONO")


def _is_multiframe(header: Dataset) -> bool:
    return str(header.get("NumberOfFrames") or "1").strip() not in ("0", "1")


def read_image_header(path: Path) -> Dataset | None:
    """Read the tags that distinguish kinds of DICOM images; None if the file is not DICOM, or is a segmentation."""
    if not is_dicom(path):
        return None
    try:
        header = read_header(path, ["SOPClassUID", "Modality", "NumberOfFrames", "PhotometricInterpretation", "Rows"])
    except CaseError:
        return None
    return header if header.get("Modality") != "SEG" and "Rows" in header else None


def recognises(path: Path) -> bool:
    if path.is_dir():
        return any(is_dicom(file) for file in itertools.islice(_likely_slices_first(path), MAX_OPENED_FILES))
    header = read_image_header(path)
    return header is not None and not is_multiframe_or_colour(header)


def _likely_slices_first(folder: Path) -> list[Path]:
    """Sort the files of a folder by how likely they are slices, so that few need to be opened."""

    def unlikely(file: Path) -> bool:
        ending = file.suffix.lower()
        return ending not in ("", ".dcm", ".ima") and not ending[1:].isdigit()  # UIDs end in ".123"

    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(files, key=lambda file: (unlikely(file), file.name))


def read(path: Path, settings: DatasetSettings) -> Raster:
    """Read the only series in a folder, or one slice.

    Raises:
        CaseError: the folder holds no series or several, or as in `read_files`.
    """
    files = dicom_files(path) if path.is_dir() else [path]
    images: dict[str, list[Path]] = {}
    for file in files:
        header = read_header(file, ["SeriesInstanceUID", "Modality", "Rows"])
        if header.get("Modality") != "SEG" and "Rows" in header:
            images.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(file)
    if len(images) != 1:
        raise CaseError(f"{path}: holds {len(images)} image series, expected one; put each in a separate folder.")
    return read_files(next(iter(images.values())), settings, path)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    raise CaseError(f"{path}: a DICOM image is not a mask; give a DICOM-SEG, or a volume file on its grid.")


def read_files(paths: Sequence[Path], settings: DatasetSettings, where: Path | None = None) -> Raster:
    """Read the slices of one series, given in any order, in rescaled values.

    Raises:
        CaseError: unreadable or cut short; slices are missing (unless `allow_gaps`), duplicated, or unequal in size.
    """
    where = where or paths[0].parent
    slices = _sorted_slices(paths, where)
    first = slices[0].header
    check_size(where, pixel_count(slices[0].path, first) * 4 * len(slices))
    with explain_dicom(slices[0].path):
        step = _step(slices, where, settings.allow_gaps)
        y, x = (float(v) for v in first.get("PixelSpacing") or (1.0, 1.0))
        affine = _affine(slices, where, step, (y, x))
    array = np.stack([_rescaled_pixels(entry) for entry in slices])
    return Raster(array, (step, y, x), where, affine, window=_window(first))


def _has_position(header: Dataset) -> bool:
    return "ImagePositionPatient" in header and "ImageOrientationPatient" in header


def _sorted_slices(paths: Sequence[Path], where: Path) -> list[_Slice]:
    """Sort the slices by their position along the normal, or by instance number if the series has no positions."""
    headers = [(path, read_header(path)) for path in paths]
    first_path, first = headers[0]
    normal: np.ndarray | None = None
    if _has_position(first):
        with explain_dicom(first_path):
            normal = np.cross(*np.reshape(np.array(first.ImageOrientationPatient, float), (2, 3)))
    slices = []
    for path, header in headers:
        with explain_dicom(path):
            if is_enhanced(header) or _is_multiframe(header):
                raise CaseError(f"{path}: holds several frames, expected one slice; give this file as the image.")
            _check_same_grid(path, header, first_path, first)
            if normal is None:
                position = float(header.get("InstanceNumber") or 0)
            elif "ImagePositionPatient" in header:
                position = float(np.dot(normal, np.array(header.ImagePositionPatient, float)))
            else:
                raise CaseError(
                    f"{path}: this slice lacks ImagePositionPatient, which others of the series have; export it again."
                )
        slices.append(_Slice(path, header, position))
    return sorted(slices, key=lambda entry: (entry.position, entry.path.name))


def _check_same_grid(path: Path, header: Dataset, first_path: Path, first: Dataset) -> None:
    for key in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        a, b = (np.array(h.get(key, ()), float) for h in (first, header))
        if a.shape != b.shape or not np.allclose(a, b, atol=1e-3):
            raise CaseError(
                f"{path}: its {key} {b.tolist()} differs from {a.tolist()} of {first_path.name}; slices of one series "
                "must be alike; put each series in a separate folder."
            )


def _step(slices: Sequence[_Slice], where: Path, allow_gaps: bool) -> float:
    """Return the distance between slices in mm.

    Raises:
        CaseError: two slices have the same position, or a slice is missing.
    """
    header = slices[0].header
    if len(slices) == 1 or not _has_position(header):
        return float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 1.0)
    positions = np.array([entry.position for entry in slices])
    steps = np.diff(positions)
    median = float(np.median(steps))
    duplicate = int(np.argmin(steps))
    if steps[duplicate] < STEP_TOLERANCE_MM:
        raise CaseError(
            f"{where}: two slices lie at {positions[duplicate]:.2f} mm: {slices[duplicate].path.name} and "
            f"{slices[duplicate + 1].path.name}; remove one, or put each series in a separate folder."
        )
    irregular = np.flatnonzero(np.abs(steps - median) > 0.01 * median + STEP_TOLERANCE_MM)
    if irregular.size:
        at = int(irregular[0])
        problem = (
            f"{where}: {'a slice is missing' if steps[at] > median else 'slices are unevenly spaced'} between slice "
            f"{at} ({slices[at].path.name}, {positions[at]:.2f} mm) and slice {at + 1} ({slices[at + 1].path.name}, "
            f"{positions[at + 1]:.2f} mm): the step is {steps[at]:.2f} mm, elsewhere {median:.2f} mm"
        )
        if not allow_gaps:
            raise CaseError(f"{problem}. Copy the missing slices, or accept the gap with --allow-gaps.")
        warnings.warn(f"{problem}; read as if the slices were neighbours.", CaseWarning, stacklevel=3)
    return median


def _affine(slices: Sequence[_Slice], where: Path, step: float, pixel: tuple[float, float]) -> np.ndarray | None:
    first = slices[0].header
    if not _has_position(first):
        return None
    along_row, along_column = np.reshape(np.array(first.ImageOrientationPatient, float), (2, 3))
    origin = np.array(first.ImagePositionPatient, float)
    normal = np.cross(along_row, along_column)
    if len(slices) > 1:  # a tilted gantry shifts slices in their plane, so the vector is measured
        slice_vector = np.array(slices[-1].header.ImagePositionPatient, float) - origin
        slice_vector = slice_vector * (step / float(np.dot(normal, slice_vector)))
        _check_aligned(slices, where, slice_vector / step, max(pixel))
    else:
        slice_vector = normal * step
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = along_row * pixel[1], along_column * pixel[0], slice_vector
    affine[:3, 3] = origin
    return np.asarray(LPS_TO_RAS @ affine)


def _check_aligned(slices: Sequence[_Slice], where: Path, direction: np.ndarray, pixel: float) -> None:
    """Refuse slices that do not lie on one line: no affine describes them."""
    positions = np.array([entry.position for entry in slices])
    corners = np.array([entry.header.ImagePositionPatient for entry in slices], float)
    offsets = np.linalg.norm(corners - corners[0] - (positions - positions[0])[:, None] * direction, axis=1)
    worst = int(offsets.argmax())
    if offsets[worst] > 0.5 * pixel + STEP_TOLERANCE_MM:
        raise CaseError(
            f"{where}: slice {worst} ({slices[worst].path.name}, {positions[worst]:.2f} mm) lies "
            f"{offsets[worst]:.2f} mm beside the line of the others, more than half a pixel ({0.5 * pixel:.2f} mm); "
            "put each stack in a separate folder, or convert the series to NIfTI with a resampling tool."
        )


def _rescaled_pixels(entry: _Slice) -> np.ndarray:
    """Read one slice in rescaled values: int16 or int32 if slope and intercept are whole numbers, else float32."""
    _, stored = read_stored(entry.path)
    header = entry.header
    with explain_dicom(entry.path):
        slope, intercept = _rescaling(header)
        if header.get("PhotometricInterpretation") == "MONOCHROME1":
            stored = invert_monochrome1(stored, header)
    if slope.is_integer() and intercept.is_integer():
        values = stored.astype(np.int32) * int(slope) + int(intercept)
        fits = values.min(initial=0) >= -32768 and values.max(initial=0) <= 32767
        return values.astype(np.int16) if fits else values
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _rescaling(header: Dataset) -> tuple[float, float]:
    return float(header.get("RescaleSlope", 1) or 1), float(header.get("RescaleIntercept", 0) or 0)


def invert_monochrome1(stored: np.ndarray, header: Dataset) -> np.ndarray:
    """Invert stored values of MONOCHROME1, where the lowest value is white."""
    low = -(1 << (int(header.BitsStored) - 1)) if int(header.get("PixelRepresentation", 0)) else 0
    return np.asarray((2 * low + (1 << int(header.BitsStored)) - 1) - stored.astype(np.int32))


def read_stored(path: Path) -> tuple[Dataset, np.ndarray]:
    """Read a file and its stored values: [Y, X] or [T, Y, X], with a last axis of 3 (RGB) if it has colours.

    Raises:
        CaseError: cut short, damaged, or of an encoding that neither pydicom nor SimpleITK decodes.
    """
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes header values
            dataset = pydicom.dcmread(path)
            try:
                return dataset, np.asarray(pydicom.pixels.pixel_array(dataset))
            except (RuntimeError, NotImplementedError):  # pydicom has no decoder for this encoding
                return dataset, _decode_with_itk(path, dataset)
    except Exception as error:  # pydicom and its decoders raise many kinds on damaged files
        sizes = re.search(r"less than expected \((\d+) vs (\d+) bytes\)", str(error))
        if sizes:
            raise CaseError(f"{path}: cut short: {sizes[1]} of {sizes[2]} bytes of pixels; copy it again.") from None
        raise CaseError(
            f"{path}: its pixels cannot be read ({type(error).__name__} in its {path.stat().st_size} bytes); copy it "
            "again, or convert it to an uncompressed transfer syntax."
        ) from None


def _decode_with_itk(path: Path, dataset: Dataset) -> np.ndarray:
    """Decode with SimpleITK and undo its rescaling, since callers expect stored values."""
    import SimpleITK as sitk

    array = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
    array = array[0] if array.ndim > 2 and array.shape[0] == 1 else array
    slope, intercept = _rescaling(dataset)
    stored = np.dtype(f"{'i' if dataset.PixelRepresentation else 'u'}{dataset.BitsAllocated // 8}")
    return np.rint((array.astype(np.float64) - intercept) / slope).astype(stored)


def _window(header: Dataset) -> tuple[float, float] | None:
    """Return (low, high) of the first window of the header; None if it is missing or invalid."""
    try:
        centre, width = (float(np.ravel(header[key].value)[0]) for key in ("WindowCenter", "WindowWidth"))
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return (centre - width / 2, centre + width / 2) if width > 0 and math.isfinite(centre + width) else None
