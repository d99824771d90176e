"""Open a scan, clip or still image for prediction: its frames, and the mapping back to the grid of the file.

Legend: T frames, C channels, H and W pixels of the frames; Z, Y, X of the file's array; P label planes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from medsam2.cases.assemble import assemble
from medsam2.cases.case import Case, CaseRef, Label, Orientation
from medsam2.cases.formats.dicom_series import dicom_files, is_enhanced, read_header
from medsam2.cases.formats.frames import list_frames
from medsam2.cases.formats.picture import decode
from medsam2.cases.formats.registry import find_format, read_image, read_mask
from medsam2.cases.formats.volume import ITK_READERS
from medsam2.cases.geometry import CaseWarning, align_mask, default_affine, orientation_of, source_affine
from medsam2.cases.intensity import to_uint8
from medsam2.cases.layouts.dicom import MODALITIES
from medsam2.cases.raster import MaskRaster, Raster
from medsam2.cases.settings import WINDOW_PRESETS, DatasetSettings
from medsam2.cases.values import present_values
from medsam2.errors import UserError
from medsam2.inference.features import Frames
from medsam2.inference.frames import VideoFrames, channels_first, open_frames

INDICES = {0: "third", 1: "second", 2: "first"}


class ScanSettings(DatasetSettings):
    """Settings of how scans are read, as in `medsam2 prepare`, for all inputs.

    Attributes:
        modality: "" to read it from the file. threshold: for mask files with fractional values.
        axis: the axis to slice: the file's last index ("file"), x, y or z of the patient, or the axis of the coarsest
            spacing ("auto", as in `medsam2 prepare`).
    """

    axis: Literal["file", "auto", "x", "y", "z"] = "file"  # type: ignore[assignment]  # adds "file" to the choices


@dataclass(frozen=True, eq=False)
class Scan:
    """An input of the prediction.

    Attributes:
        path: the input. source: its ending if it is a volume file, else the name of its format.
        frames: T frames uint8 [C, H, W].
        shape: (Z, Y, X) of the file's array. orientation: its mapping to [T, H, W].
        spacing: (z in mm, or seconds if `moving`; y, x in mm) of [T, H, W]. affine: RAS+ of [T, H, W], or None.
        files: the files of the input. notes: warnings for the user.
    """

    path: Path
    source: str
    settings: ScanSettings
    frames: Frames
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    moving: bool
    orientation: Orientation = Orientation()
    affine: np.ndarray | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def frames_shape(self) -> tuple[int, int, int]:
        """(T, H, W)."""
        t, h, w = (self.shape[axis] for axis in self.orientation.axes)
        return t, h, w

    @property
    def stems(self) -> tuple[str, ...]:
        """Names of the frames without ending; empty unless they are files with different names."""
        if self.source == "picture":
            return (self.path.stem,)
        stems = tuple(file.stem for file in list_frames(self.path)) if self.source == "frames" else ()
        return stems if len(set(stems)) == len(stems) else ()

    @property
    def _order(self) -> tuple[int, int, int]:
        """Axes of the file's array for the slice number, x and y of a prompt."""
        sliced = self.orientation.axes[0]
        y, x = sorted(axis for axis in range(3) if axis != sliced)
        return sliced, x, y

    @property
    def prompt_shape(self) -> tuple[int, int, int]:
        """(slices, height, width) in the coordinates of prompts."""
        sliced, x, y = self._order
        return self.shape[sliced], self.shape[y], self.shape[x]

    @property
    def coordinates(self) -> str:
        """Description of the prompts' coordinates, for messages."""
        if self.moving or self.source == "picture":
            return "frames and pixels are counted from 0"
        sliced, x, y = self._order
        return (
            f"slices run along the file's {INDICES[sliced]} index, x and y along its {INDICES[x]} and {INDICES[y]}, "
            "all from 0 as in 3D Slicer (ITK-SNAP counts from 1)"
        )

    def to_frame(self, index: int, x: float, y: float) -> tuple[int, float, float]:
        """Convert slice, x, y of the file to (frame, x, y) of the frames; fractions of a voxel are preserved."""
        sliced, x_axis, y_axis = self._order
        point = [0.0, 0.0, 0.0]
        point[sliced], point[x_axis], point[y_axis] = float(index), x, y
        frame, v, u = self.orientation.map_point(point, self.shape)
        return int(frame), u, v


def open_scan(path: Path, settings: ScanSettings | None = None) -> Scan:
    """Read an input; videos and folders of 8-bit pictures are decoded later, frame by frame.

    Raises:
        UserError: the input does not exist, has an unknown format, cannot be read, or has no modality where
            intensities must be scaled.
    """
    settings = settings or ScanSettings()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder.")
    source = source_of(path)
    if source == "video" or (source == "frames" and decode(list_frames(path)[0]).dtype == np.uint8):
        return _open_clip(path, source, settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CaseWarning)
        raster = read_image(path, settings)
    notes = tuple(str(entry.message) for entry in caught if issubclass(entry.category, CaseWarning))
    return _scale_raster(path, source, raster, settings, notes)


def source_of(path: Path) -> str:
    """Return the ending of a volume file, else the name of the input's format; "" if the format is unknown."""
    file_format = find_format(path)
    if file_format is None:
        return ""
    if file_format.NAME == "volume":
        return next(ending for ending in ITK_READERS if path.name.lower().endswith(ending))
    if file_format.NAME == "dicom_multiframe" and is_enhanced(read_header(path, ["SOPClassUID"])):
        return "dicom_series"  # slices of a volume, although in one file
    return file_format.NAME


def _open_clip(path: Path, source: str, settings: ScanSettings) -> Scan:
    """Open a video or a folder of 8-bit pictures: clips in time whose intensities need no scaling."""
    frames = open_frames(path)
    height, width = frames[0].shape[-2:]
    seconds = frames.seconds_per_frame if isinstance(frames, VideoFrames) else 1.0
    shape, spacing = (len(frames), height, width), (seconds, 1.0, 1.0)
    return Scan(path, source, settings, frames, shape, spacing, moving=True, files=(path,))


def _scale_raster(path: Path, source: str, raster: Raster, settings: ScanSettings, notes: tuple[str, ...]) -> Scan:
    """Orient a raster upright within its slices and scale it to uint8."""
    files = _list_files(path, source)
    modality = _find_modality(path, source, files, raster, settings)
    affine = default_affine(raster.spacing) if raster.affine is None else raster.affine
    axis = _find_axis(raster, affine, settings.axis)
    case = _assemble_case(path, raster, settings.model_copy(update={"modality": modality, "axis": axis}))
    coarsest = orientation_of(affine, "auto").axes[0]
    if not raster.moving and settings.axis == "file" and coarsest != 0 and min(raster.array.shape[:3]) > 1:
        notes += (
            f"sliced along the file's third index ({raster.spacing[0]:.3g} mm); `medsam2 prepare` would slice along "
            f"the coarsest spacing, the {INDICES[coarsest]} index ({raster.spacing[coarsest]:.3g} mm), as --axis auto "
            "does",
        )
    count, height, width = raster.array.shape[:3]
    return Scan(
        path,
        source,
        settings,
        frames=channels_first(to_uint8(case, settings.window)[0]),
        shape=(count, height, width),
        spacing=case.spacing,
        moving=raster.moving,
        orientation=case.orientation,
        affine=case.affine,
        files=files,
        notes=notes,
    )


def _assemble_case(path: Path, raster: Raster, settings: DatasetSettings) -> Case:
    """Orient and check a raster by the code of `medsam2 prepare`, which needs a label plane; this one is empty."""
    blank = np.broadcast_to(np.uint8(0), (1, *raster.array.shape[:3]))
    mask = MaskRaster(blank, path, raster.affine, labels=(Label(1, "object"),))
    ref = CaseRef("", path.name, images=(path,), modality=settings.modality, settings=settings)
    return assemble(ref, raster, [mask])


def _find_axis(raster: Raster, affine: np.ndarray, axis: str) -> str:
    """Return the patient's axis along which to slice, for `orientation_of`."""
    if raster.moving:
        return "auto"  # frames of a clip are not reoriented
    if axis != "file" and raster.array.shape[0] > 1:  # a single slice is a picture, which is not sliced again
        return axis
    return next(letter for letter in "zyx" if orientation_of(affine, letter).axes[0] == 0)


def _find_modality(path: Path, source: str, files: Sequence[Path], raster: Raster, settings: ScanSettings) -> str:
    """Return the modality of the settings, else of the DICOM header, else a default if no scaling depends on it.

    Raises:
        UserError: the modality is unknown, but the scaling of intensities depends on it.
    """
    stated = settings.modality
    if not stated and source.startswith("dicom") and files:
        stated = MODALITIES.get(str(read_header(files[0], ["Modality"]).get("Modality", "")), "")
    if stated:
        return stated
    if settings.window in WINDOW_PRESETS:
        return "CT"  # presets are in HU
    if raster.array.dtype in (np.uint8, np.bool_) or settings.window is not None:
        return "OTHER"
    raise UserError(
        f"{path}: its modality is not known, which decides how {raster.array.dtype} intensities are scaled; give "
        "--modality CT, MR, PT, US, ENDOSCOPY, XRAY, PATHOLOGY, MICROSCOPY or OTHER, or --window."
    )


def _list_files(path: Path, source: str) -> tuple[Path, ...]:
    """Return the files of an input; of a DICOM series only its images."""
    if source != "dicom_series" or not path.is_dir():
        return (path,)
    headers = [(file, read_header(file, ["Modality", "Rows"])) for file in dicom_files(path)]
    return tuple(file for file, header in headers if header.get("Modality") != "SEG" and "Rows" in header)


# ------------------------------------------------------------------------------------------------------ masks


def default_name(value: int) -> str:
    """Return the default name of a label."""
    return f"label_{value}"


def read_mask_like(path: Path, scan: Scan) -> tuple[np.ndarray, tuple[tuple[int, int, str], ...]]:
    """Read label planes [P, T, H, W] of a mask file on the scan's frames, and (plane, value, name) of its labels.

    A mask on another grid is resampled onto the scan's grid by both affines, nearest neighbour.

    Raises:
        UserError: the mask cannot be read, has fractional values without a threshold, or does not fit the scan's grid.
    """
    if not path.exists():
        raise UserError(f"{path}: no such mask.")
    mask = read_mask(path, scan.settings)
    if not mask.exact:
        threshold = scan.settings.threshold
        if threshold is None:
            raise UserError(f"{path}: holds fractions or a lossy picture, not labels; give --threshold VALUE.")
        mask = replace(mask, planes=(mask.planes > threshold).astype(np.uint8))
    native = None if scan.affine is None else source_affine(scan.affine, scan.frames_shape, scan.orientation)
    image = Raster(np.broadcast_to(np.uint8(0), scan.shape), scan.spacing, scan.path, native, scan.moving)
    planes, _ = align_mask(mask, image)
    labels = tuple((label.plane, label.id, label.name) for label in mask.labels) or tuple(
        (0, value, default_name(value)) for value in present_values(planes[0])
    )
    return np.stack([scan.orientation.apply(plane) for plane in planes]), labels
