"""Single pictures (PNG, JPEG, BMP) and TIFF files of one or many pages, in the native type of the file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.tiff import read_tiff
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.raster import MaskRaster, Raster, check_readable, check_size, explain
from medsam2.cases.settings import DatasetSettings
from medsam2.cases.values import as_labels

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

NAME = "picture"
READS = "pictures (PNG, JPEG, BMP) and TIFF with one or many pages"

TIFF_ENDINGS = (".tif", ".tiff")
JPEG_ENDINGS = (".jpg", ".jpeg")
ENDINGS = (*JPEG_ENDINGS, ".png", ".bmp", *TIFF_ENDINGS)
GREY_MODES = ("L", "1", "P", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
MAX_JPEG_CHANNEL_SPREAD = 40
"""Largest difference between the channels of a grey mask that JPEG compression explains."""


def recognises(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.is_file()


def read(path: Path, settings: DatasetSettings) -> Raster:
    """Read a picture as one slice; pages of a TIFF are slices, or frames if the file has a time axis."""
    pages, _ = _read_pages(path, settings)
    return replace(pages, array=grey_if_equal(pages.array))


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """Read palette indices or grey values as labels.

    Raises:
        CaseError: the mask has colours.
    """
    pages, lossy = _read_pages(path, settings, mask=True)
    return MaskRaster(as_labels(grey_mask(path, pages.array, lossy), path)[None], path, lossy=lossy)


def is_lossy(path: Path) -> bool:
    return path.suffix.lower() in JPEG_ENDINGS


def decode(path: Path, count: int = 1) -> np.ndarray:
    """Read [H, W] or [H, W, 3] of one picture; `count` pictures of its size must fit in memory together.

    Raises:
        CaseError: damaged, cut short, too large, or a TIFF of several pages.
    """
    return _only_page(path, count, mask=False)


def decode_mask(path: Path, count: int = 1) -> np.ndarray:
    """Read label values [H, W]: palette indices or grey values."""
    return grey_mask(path, _only_page(path, count, mask=True), is_lossy(path))


def _only_page(path: Path, count: int, mask: bool) -> np.ndarray:
    array = _read_pages(path, DatasetSettings(), mask, count)[0].array
    if array.shape[0] != 1:
        raise CaseError(f"{path}: {array.shape[0]} pages where one frame is expected; save one page per file.")
    return np.asarray(array[0])


def _read_pages(path: Path, settings: DatasetSettings, mask: bool = False, count: int = 1) -> tuple[Raster, bool]:
    """Read the pages of a TIFF or picture (palette indices of a mask), and whether their compression is lossy."""
    check_readable(path)
    if path.suffix.lower() in TIFF_ENDINGS:
        pages, lossy, translucent = read_tiff(path, settings, mask, count)
    else:
        array, translucent = _read_picture(path, mask, count)
        pages, lossy = Raster(array[None], (1.0, 1.0, 1.0), path), is_lossy(path)
    if translucent:
        warnings.warn(f"{path.name}: its transparency was dropped; its colours are kept.", CaseWarning, 3)
    return pages, lossy


def _read_picture(path: Path, mask: bool, count: int) -> tuple[np.ndarray, bool]:
    """Read [H, W] or [H, W, 3], and whether a partly transparent alpha channel was dropped."""
    with _open(path) as picture:
        if picture.format == "PNG" and picture.mode in ("RGB", "RGBA", "LA") and ";16" in str(picture.tile[0][3]):
            raise CaseError(f"{path}: colours of 16 bits per channel are not read; save 8-bit colours or 16-bit grey.")
        size = 4 if picture.mode in ("I", "F") else 2 if picture.mode.startswith("I;16") else 1
        # grey frames become RGB if another frame of the clip has colours
        check_size(path, picture.width * picture.height * 3 * size * count)
        if mask and picture.mode == "1":
            return (np.asarray(picture.convert("L")) > 0).astype(np.uint8), False
        if mask and picture.mode in GREY_MODES:
            return np.asarray(picture), False
        translucent = False
        if "A" in picture.getbands() or "transparency" in picture.info:
            translucent = bool((np.asarray(picture.convert("RGBA"))[..., 3] < 255).any())
        if picture.mode in ("F", "I") or picture.mode.startswith("I;16"):
            array = np.asarray(picture)
            return array.astype(array.dtype.newbyteorder("="), copy=False), translucent
        return np.asarray(picture.convert("L" if picture.mode in ("L", "1", "LA") else "RGB")), translucent


def grey_mask(path: Path, array: np.ndarray, lossy: bool) -> np.ndarray:
    """Return one channel of a mask [..., H, W, 3] without colours, allowing the tint that JPEG causes."""
    if array.ndim == 2 or array.shape[-1] != 3:
        return array
    low, high = array.min(axis=-1), array.max(axis=-1)
    if (high.astype(np.int64) - low).max(initial=0) > (MAX_JPEG_CHANNEL_SPREAD if lossy else 0):
        raise CaseError(
            f"{path}: a mask must be a palette or grey picture, found mode RGB with colours; save the label values "
            "as grey, or say which colour is which label in labels.json (EndoVis)."
        )
    return np.ascontiguousarray(array[..., 1])


def grey_if_equal(frames: np.ndarray) -> np.ndarray:
    """Return [T, H, W] if the three channels of [T, H, W, 3] are equal everywhere, else the frames unchanged."""
    if frames.ndim == 4 and all((frame == frame[..., :1]).all() for frame in frames):
        return np.ascontiguousarray(frames[..., 0])
    return frames


@contextmanager
def _open(path: Path) -> Iterator[ImageFile]:
    """Open a picture lazily; any error of Pillow becomes a `CaseError` that names the file."""
    from PIL import Image

    with explain(path, "not readable as a picture", "copy or export it again"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_size` decides
                picture = Image.open(path)
        except Image.DecompressionBombError as error:
            raise CaseError(f"{path}: too many pixels for one picture ({error}); split it into tiles.") from None
        with picture:
            yield picture
