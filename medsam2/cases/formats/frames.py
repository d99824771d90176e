"""Folders of frames (JPEG, PNG) and of palette or grey PNG masks, through Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.limits import MAX_BYTES, check_readable, check_size

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


def list_frames(folder: Path) -> list[Path]:
    """The image files of a folder in order of their name (numbers compared as numbers)."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".")]
    return sorted(files, key=_natural)


def read_frames(paths: list[Path], limit: int = MAX_BYTES) -> np.ndarray:
    """Frames uint8 [T, H, W] where all are grey (also RGB with equal channels), else [T, H, W, 3].

    Raises:
        CaseError: an unreadable frame, or frames of unequal size.
    """
    frames = [_read_one(path, len(paths), limit) for path in paths]
    if any(f.ndim == 3 for f in frames):
        frames = [f if f.ndim == 3 else np.repeat(f[..., None], 3, axis=2) for f in frames]
    _check_equal(paths, frames)
    return grey_if_equal(np.stack(frames))


def read_masks(paths: list[Path], limit: int = MAX_BYTES) -> np.ndarray:
    """Label masks [T, H, W] uint8 or uint16: palette indices, or grey values as they are.

    Raises:
        CaseError: an unreadable mask, a colour mask, or masks of unequal size.
    """
    from PIL import Image

    masks = []
    for path in paths:
        check_readable(path)
        try:
            with Image.open(path) as picture:
                check_size(path, picture.width * picture.height * len(paths) * 2, limit)
                mode = picture.mode
                array = np.asarray(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CaseError(f"{path}: not readable as a picture ({error}); copy or export it again.") from None
        if mode not in ("P", "L", "1", "I;16", "I"):
            raise CaseError(f"{path}: a mask must be a palette or grey picture, found mode {mode}.")
        masks.append(array.astype(np.uint16 if array.max(initial=0) > 255 else np.uint8))
    _check_equal(paths, masks)
    return np.stack(masks)


def grey_if_equal(frames: np.ndarray) -> np.ndarray:
    """[T, H, W] where the three channels of [T, H, W, 3] are equal everywhere, else the frames unchanged."""
    if frames.ndim == 4:
        for frame in frames:
            if not (np.array_equal(frame[..., 0], frame[..., 1]) and np.array_equal(frame[..., 0], frame[..., 2])):
                return frames
        return np.ascontiguousarray(frames[..., 0])
    return frames


def _read_one(path: Path, count: int, limit: int) -> np.ndarray:
    from PIL import Image

    check_readable(path)
    try:
        with Image.open(path) as picture:
            check_size(path, picture.width * picture.height * 3 * count, limit)
            grey = picture.mode in ("L", "1")
            return np.asarray(picture.convert("L" if grey else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CaseError(f"{path}: not readable as a picture ({error}); copy or export it again.") from None


def _check_equal(paths: list[Path], arrays: list[np.ndarray]) -> None:
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise CaseError(
                f"{path}: size {array.shape[:2]} differs from {arrays[0].shape[:2]} of {paths[0].name}; "
                "all frames of a clip must be of one size."
            )


def _natural(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits[:18]) if digits else -1, path.name)
