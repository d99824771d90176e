"""Folders of pictures (PNG, JPEG, BMP, TIFF) that are frames in time, and folders of mask frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.picture import ENDINGS, decode, decode_mask, grey_if_equal, is_lossy
from medsam2.cases.raster import MaskRaster, Raster, check_readable
from medsam2.cases.settings import DatasetSettings
from medsam2.cases.values import as_labels

NAME = "frames"
READS = "folders of pictures, which are frames in time"


def recognises(path: Path) -> bool:
    return path.is_dir() and any(True for _ in _pictures(path))


def read(path: Path, settings: DatasetSettings) -> Raster:
    """Read all pictures of the folder in the order of `list_frames`; the time between them is unknown."""
    return Raster(read_frames(require_frames(path)), (1.0, 1.0, 1.0), path, moving=True)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    return read_mask_frames(require_frames(path), path)


def read_mask_frames(paths: list[Path], where: Path) -> MaskRaster:
    """Stack mask frames into one label plane of palette indices or grey values.

    Raises:
        CaseError: an unreadable mask, a colour mask, or masks of unequal size.
    """
    masks = [as_labels(decode_mask(path, len(paths)), path) for path in paths]
    check_equal_sizes(paths, masks)
    return MaskRaster(np.stack(masks)[None], where, lossy=any(is_lossy(path) for path in paths))


def list_frames(folder: Path) -> list[Path]:
    """List the image files of a folder, sorted by the number in their names, then by name."""
    return sorted(_pictures(folder), key=_frame_number_and_name)


def _pictures(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and not path.name.startswith("."))


def read_frames(paths: list[Path]) -> np.ndarray:
    """Read frames [T, H, W] in their native type if all are grey (or RGB with equal channels), else [T, H, W, 3].

    Raises:
        CaseError: an unreadable frame, or frames of unequal size.
    """
    frames = [decode(path, len(paths)) for path in paths]
    if any(f.ndim == 3 for f in frames):
        frames = [f if f.ndim == 3 else np.repeat(f[..., None], 3, axis=2) for f in frames]
    check_equal_sizes(paths, frames)
    for path, frame in zip(paths, frames, strict=True):
        if frame.dtype != frames[0].dtype:
            raise CaseError(
                f"{path}: {frame.dtype}, but {paths[0].name} is {frames[0].dtype}; all frames must have one type."
            )
    return grey_if_equal(np.stack(frames))


def require_frames(folder: Path) -> list[Path]:
    """List the frames of a folder, of which there must be at least one."""
    check_readable(folder)
    frames = list_frames(folder)
    if not frames:
        raise CaseError(f"{folder}: holds no frames.")
    return frames


def check_equal_sizes(paths: Sequence[Path], arrays: Sequence[np.ndarray]) -> None:
    """Refuse frames of unequal size, naming the first that differs."""
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise CaseError(
                f"{path}: size {array.shape[:2]} differs from {arrays[0].shape[:2]} of {paths[0].name}; "
                "all frames of a clip must have one size."
            )


def _frame_number_and_name(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits[:18]) if digits else -1, path.name)
