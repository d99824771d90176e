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
PREAMBLE = 132
NEEDED = (
    *("SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "BitsStored"),
    *("PixelRepresentation", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber"),
    *("SpacingBetweenSlices", "SliceThickness", "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"),
    *("FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate", "SequenceOfUltrasoundRegions"),
)
"""Whatever is asked of a header here; names and descriptions are not even read."""
STORAGE = "1.2.840.10008.5.1.4.1.1."
ENHANCED = tuple(STORAGE + kind for kind in ("2.1", "4.1", "130", "2.2", "4.4", "128.1"))
"""Enhanced CT, MR and PET, and Legacy Converted ones: volumes in one file, whose geometry lies in functional groups."""
OPENED = 10
"""Files of a folder that are opened to learn whether it holds slices."""
ROUNDING = 0.01
"""mm by which the steps between slices may differ beside 1 %."""


@dataclass(frozen=True, eq=False)
class _Slice:
    path: Path
    header: Dataset
    place: float  # along the normal in mm, or its number where the series does not say where it lies


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark behind its preamble; DICOMDIR, an index of other files, does not count."""
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(PREAMBLE)[128:] == b"DICM"
    except OSError:
        return False


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files directly in a folder, by name."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and is_dicom(p))


def read_header(path: Path, tags: Sequence[str] | None = None) -> Dataset:
    """`tags`, or all that reading an image needs; decoded at once, since pydicom quotes odd values when it does so.

    Raises:
        CaseError: not DICOM, or cut short; no text of the file is in the message.
    """
    import pydicom

    check_readable(path)
    with explained(path, "not readable as DICOM", "copy it again"):
        names: Any = list(tags or NEEDED)
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=names)
        for _ in header.iterall():
            pass
        return header


@contextmanager
def explained(
    path: Path,
    fault: str = "a value of its header is not of the kind that DICOM asks for",
    remedy: str = "export it again",
) -> Iterator[None]:
    """Any error becomes a `CaseError` without its text, which may quote the header: it may be about a patient."""
    with explain(path, fault, remedy, quote=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom quotes values of the file
        warnings.simplefilter("always", CaseWarning)  # ours do not
        yield


def pixel_count(path: Path, header: Dataset) -> int:
    """Rows times columns times frames, as the header has them.

    Raises:
        CaseError: the header does not hold them.
    """
    try:
        return int(header.Rows) * int(header.Columns) * int(header.get("NumberOfFrames") or 1)
    except (AttributeError, TypeError, ValueError):
        raise CaseError(
            f"{path}: cut short, or its header holds no sound number of rows, columns or frames; copy or export it "
            "again."
        ) from None


def is_enhanced(header: Dataset) -> bool:
    """Whether one file holds a whole volume (enhanced CT, MR or PET), placed by its functional groups."""
    return str(header.get("SOPClassUID", "")) in ENHANCED


def is_frames(header: Dataset) -> bool:
    """Whether a file holds frames in time or colours, and so is no slice of a series."""
    return _holds_frames(header) or not str(header.get("PhotometricInterpretation", "MONO")).startswith("MONO")


def _holds_frames(header: Dataset) -> bool:
    return str(header.get("NumberOfFrames") or "1").strip() not in ("0", "1")


def image_header(path: Path) -> Dataset | None:
    """What tells the kinds of DICOM images apart; None of a file that is no DICOM image, or a segmentation."""
    if not is_dicom(path):
        return None
    try:
        header = read_header(path, ["SOPClassUID", "Modality", "NumberOfFrames", "PhotometricInterpretation", "Rows"])
    except CaseError:
        return None
    return header if header.get("Modality") != "SEG" and "Rows" in header else None


def recognises(path: Path) -> bool:
    if path.is_dir():
        return any(is_dicom(file) for file in itertools.islice(_likely(path), OPENED))
    header = image_header(path)
    return header is not None and not is_frames(header)


def _likely(folder: Path) -> list[Path]:
    """Files of a folder, likely slices first; a folder of ten thousand pictures is not opened file by file."""

    def unlikely(file: Path) -> bool:
        ending = file.suffix.lower()
        return ending not in ("", ".dcm", ".ima") and not ending[1:].isdigit()  # names without endings hold UIDs

    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(files, key=lambda file: (unlikely(file), file.name))


def read(path: Path, settings: DatasetSettings) -> Raster:
    """The one series in a folder, or one slice.

    Raises:
        CaseError: no series or several, or what `read_files` raises.
    """
    files = dicom_files(path) if path.is_dir() else [path]
    images: dict[str, list[Path]] = {}
    for file in files:
        header = read_header(file, ["SeriesInstanceUID", "Modality", "Rows"])
        if header.get("Modality") != "SEG" and "Rows" in header:
            images.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(file)
    if len(images) != 1:
        raise CaseError(f"{path}: holds {len(images)} image series, expected one; give each a folder of its own.")
    return read_files(next(iter(images.values())), settings, path)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    raise CaseError(f"{path}: a DICOM image is no mask; give a DICOM-SEG, or a volume file on its grid.")


def read_files(paths: Sequence[Path], settings: DatasetSettings, where: Path | None = None) -> Raster:
    """The slices of one series in any order, in rescaled values.

    Raises:
        CaseError: unreadable or cut short; slices that are missing (unless `allow_gaps`), twice there, or unequal.
    """
    where = where or paths[0].parent
    slices = _sorted_slices(paths, where)
    first = slices[0].header
    check_size(where, pixel_count(slices[0].path, first) * 4 * len(slices))
    with explained(slices[0].path):
        step = _step(slices, where, settings.allow_gaps)
        y, x = (float(v) for v in first.get("PixelSpacing") or (1.0, 1.0))
        affine = _affine(slices, where, step, (y, x))
    frames = [_pixels(entry) for entry in slices]
    kind = np.result_type(*{frame.dtype for frame in frames})
    array = np.stack([frame.astype(kind, copy=False) for frame in frames])
    return Raster(array, (step, y, x), where, affine, window=_window(first))


def _is_placed(header: Dataset) -> bool:
    return "ImagePositionPatient" in header and "ImageOrientationPatient" in header


def _sorted_slices(paths: Sequence[Path], where: Path) -> list[_Slice]:
    """The slices in order: by their place along the normal, else by their number."""
    headers = [(path, read_header(path)) for path in paths]
    first_path, first = headers[0]
    normal: np.ndarray | None = None
    if _is_placed(first):
        with explained(first_path):
            normal = np.cross(*np.reshape(np.array(first.ImageOrientationPatient, float), (2, 3)))
    slices = []
    for path, header in headers:
        with explained(path):
            if is_enhanced(header) or _holds_frames(header):
                raise CaseError(f"{path}: holds several frames, expected one slice; give the file itself as the image.")
            _check_alike(path, header, first_path, first)
            if normal is None:
                place = float(header.get("InstanceNumber") or 0)
            elif "ImagePositionPatient" in header:
                place = float(np.dot(normal, np.array(header.ImagePositionPatient, float)))
            else:
                raise CaseError(
                    f"{path}: a slice without ImagePositionPatient in a series that has it; export it again."
                )
        slices.append(_Slice(path, header, place))
    return sorted(slices, key=lambda s: (s.place, s.path.name))


def _check_alike(path: Path, header: Dataset, first_path: Path, first: Dataset) -> None:
    for key in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        a, b = (np.array(h.get(key, ()), float) for h in (first, header))
        if a.shape != b.shape or not np.allclose(a, b, atol=1e-3):
            raise CaseError(
                f"{path}: its {key} {b.tolist()} differs from {a.tolist()} of {first_path.name}; slices of one series "
                "must be alike: give each series a folder of its own."
            )


def _step(slices: Sequence[_Slice], where: Path, allow_gaps: bool) -> float:
    """mm between slices.

    Raises:
        CaseError: two at one place, or a gap.
    """
    header = slices[0].header
    if len(slices) == 1 or not _is_placed(header):
        return float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 1.0)
    places = np.array([s.place for s in slices])
    steps = np.diff(places)
    median = float(np.median(steps))
    same = int(np.argmin(steps))
    if steps[same] < ROUNDING:
        raise CaseError(
            f"{where}: two slices lie at {places[same]:.2f} mm: {slices[same].path.name} and "
            f"{slices[same + 1].path.name}; remove one, or give each series a folder of its own."
        )
    wrong = np.flatnonzero(np.abs(steps - median) > 0.01 * median + ROUNDING)
    if wrong.size:
        at = int(wrong[0])
        text = (
            f"{where}: {'a slice is missing' if steps[at] > median else 'slices are unevenly spaced'} between slice "
            f"{at} ({slices[at].path.name}, {places[at]:.2f} mm) and slice {at + 1} ({slices[at + 1].path.name}, "
            f"{places[at + 1]:.2f} mm): the step is {steps[at]:.2f} mm, elsewhere {median:.2f} mm"
        )
        if not allow_gaps:
            raise CaseError(f"{text}. Copy the missing slices, or accept it with --allow-gaps.")
        warnings.warn(f"{text}; read as if the slices were neighbours.", CaseWarning, stacklevel=3)
    return median


def _affine(slices: Sequence[_Slice], where: Path, step: float, pixel: tuple[float, float]) -> np.ndarray | None:
    first = slices[0].header
    if not _is_placed(first):
        return None
    along_row, along_column = np.reshape(np.array(first.ImageOrientationPatient, float), (2, 3))
    start = np.array(first.ImagePositionPatient, float)
    normal = np.cross(along_row, along_column)
    if len(slices) > 1:  # measured, so that a tilted gantry is placed as it was: only along the normal is it `step`
        across = np.array(slices[-1].header.ImagePositionPatient, float) - start
        across = across * (step / float(np.dot(normal, across)))
        _check_straight(slices, where, across / step, max(pixel))
    else:
        across = normal * step
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = along_row * pixel[1], along_column * pixel[0], across
    affine[:3, 3] = start
    return np.asarray(LPS_TO_RAS @ affine)


def _check_straight(slices: Sequence[_Slice], where: Path, direction: np.ndarray, pixel: float) -> None:
    """Refuse slices shifted in their plane against each other: no affine places them all."""
    places = np.array([s.place for s in slices])
    corners = np.array([s.header.ImagePositionPatient for s in slices], float)
    off = np.linalg.norm(corners - corners[0] - (places - places[0])[:, None] * direction, axis=1)
    worst = int(off.argmax())
    if off[worst] > 0.5 * pixel + ROUNDING:
        raise CaseError(
            f"{where}: slice {worst} ({slices[worst].path.name}, {places[worst]:.2f} mm) lies {off[worst]:.2f} mm "
            f"beside the line of the others, expected less than half a pixel ({0.5 * pixel:.2f} mm); give slices of "
            "one stack a folder of their own, or convert the series to NIfTI with a resampling tool."
        )


def _pixels(entry: _Slice) -> np.ndarray:
    """One slice in rescaled values: int16 or int32 where slope and intercept are whole, else float32."""
    _, stored = read_stored(entry.path)
    header = entry.header
    with explained(entry.path):
        slope, intercept = _rescaling(header)
        if header.get("PhotometricInterpretation") == "MONOCHROME1":
            stored = inverted(stored, header)
    if slope.is_integer() and intercept.is_integer():
        values = stored.astype(np.int32) * int(slope) + int(intercept)
        fits = values.min(initial=0) >= -32768 and values.max(initial=0) <= 32767
        return values.astype(np.int16) if fits else values
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _rescaling(header: Dataset) -> tuple[float, float]:
    return float(header.get("RescaleSlope", 1) or 1), float(header.get("RescaleIntercept", 0) or 0)


def inverted(stored: np.ndarray, header: Dataset) -> np.ndarray:
    """MONOCHROME1, whose lowest value is white, the right way round."""
    low = -(1 << (int(header.BitsStored) - 1)) if int(header.get("PixelRepresentation", 0)) else 0
    return np.asarray((2 * low + (1 << int(header.BitsStored)) - 1) - stored.astype(np.int32))


def read_stored(path: Path) -> tuple[Dataset, np.ndarray]:
    """A file and its stored values: [Y, X], or frames of that, or colours [.., 3] as RGB.

    Raises:
        CaseError: cut short, damaged, or of an encoding that neither pydicom nor SimpleITK decodes.
    """
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes values of the file
            dataset = pydicom.dcmread(path)
            try:
                return dataset, np.asarray(pydicom.pixels.pixel_array(dataset))
            except (RuntimeError, NotImplementedError):  # no decoder of pydicom's is installed for this encoding
                return dataset, _through_itk(path, dataset)
    except Exception as error:  # pydicom and its decoders raise many kinds on damaged files
        short = re.search(r"less than expected \((\d+) vs (\d+) bytes\)", str(error))
        if short:
            raise CaseError(f"{path}: cut short: {short[1]} of {short[2]} bytes of pixels; copy it again.") from None
        raise CaseError(
            f"{path}: its pixels cannot be read ({type(error).__name__} in its {path.stat().st_size} bytes); copy it "
            "again, or convert it to an uncompressed transfer syntax."
        ) from None


def _through_itk(path: Path, dataset: Dataset) -> np.ndarray:
    """SimpleITK gives rescaled values; they are scaled back, so that one place does the scaling."""
    import SimpleITK as sitk

    array = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
    array = array[0] if array.ndim > 2 and array.shape[0] == 1 else array
    slope, intercept = _rescaling(dataset)
    stored = np.dtype(f"{'i' if dataset.PixelRepresentation else 'u'}{dataset.BitsAllocated // 8}")
    return np.rint((array.astype(np.float64) - intercept) / slope).astype(stored)


def _window(header: Dataset) -> tuple[float, float] | None:
    """The first window that the file asks for; None where it has none, or a damaged one."""
    try:
        centre, width = (float(np.ravel(header[key].value)[0]) for key in ("WindowCenter", "WindowWidth"))
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return (centre - width / 2, centre + width / 2) if width > 0 and math.isfinite(centre + width) else None
