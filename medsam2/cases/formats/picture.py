"""One picture (PNG, JPEG, BMP) or a TIFF of one or many pages, in the native type of the file."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.tiff import read_tiff
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.raster import MaskRaster, Raster, check_readable, check_size
from medsam2.cases.settings import DatasetSettings
from medsam2.cases.values import as_labels

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "picture"
READS = "pictures (PNG, JPEG, BMP) and TIFF with one or many pages"

TIFF_ENDINGS = (".tif", ".tiff")
JPEG_ENDINGS = (".jpg", ".jpeg")
ENDINGS = (*JPEG_ENDINGS, ".png", ".bmp", *TIFF_ENDINGS)
GREY = ("L", "1", "P", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
JPEG_TINT = 40
"""How far the channels of a grey mask may lie apart once JPEG has damaged them."""


def recognises(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.is_file()


def read(path: Path, settings: DatasetSettings) -> Raster:
    """The picture as one slice; the pages of a TIFF as slices, or as frames where the file says so."""
    check_readable(path)
    if path.suffix.lower() in TIFF_ENDINGS:
        tiff = read_tiff(path, settings)
        _warn_of_alpha(path, tiff.translucent)
        return Raster(grey_if_equal(tiff.array), tiff.spacing, path, moving=tiff.moving)
    return Raster(grey_if_equal(decode(path)[None]), (1.0, 1.0, 1.0), path)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """Palette indices or grey values as labels.

    Raises:
        CaseError: a mask in colours.
    """
    check_readable(path)
    if path.suffix.lower() in TIFF_ENDINGS:
        tiff = read_tiff(path, settings, mask=True)
        _warn_of_alpha(path, tiff.translucent)
        planes, lossy = grey_mask(path, tiff.array, tiff.lossy), tiff.lossy
    else:
        planes, lossy = decode_mask(path)[None], is_lossy(path)
    return MaskRaster(as_labels(planes, path)[None], path, lossy=lossy)


def is_lossy(path: Path) -> bool:
    return path.suffix.lower() in JPEG_ENDINGS


def decode(path: Path, count: int = 1) -> np.ndarray:
    """[H, W] or [H, W, 3] of one picture; `count` pictures like it must fit into memory together.

    Raises:
        CaseError: damaged, cut short, or too large.
    """
    check_readable(path)
    if path.suffix.lower() in TIFF_ENDINGS:
        return _only_page(path, count, mask=False)
    deep = _deep_colour(path)
    with _opened(path) as picture:
        size = 2 if deep else 4 if picture.mode in ("I", "F") else 2 if picture.mode.startswith("I;16") else 1
        check_size(path, picture.width * picture.height * 3 * size * count)  # grey beside colour becomes colour
        return _deep_pixels(path) if deep else _pixels(path, picture)


def decode_mask(path: Path, count: int = 1) -> np.ndarray:
    """[H, W] label values: palette indices, or grey values as they are."""
    check_readable(path)
    if path.suffix.lower() in TIFF_ENDINGS:
        return grey_mask(path, _only_page(path, count, mask=True), False)
    if _deep_colour(path):
        return grey_mask(path, decode(path, count), False)
    with _opened(path) as picture:
        check_size(path, picture.width * picture.height * count * 2)
        if picture.mode == "1":
            return (np.asarray(picture.convert("L")) > 0).astype(np.uint8)
        array = np.asarray(picture) if picture.mode in GREY else _pixels(path, picture)
        return grey_mask(path, array, is_lossy(path), picture.mode)


def grey_mask(path: Path, array: np.ndarray, lossy: bool, mode: str = "RGB") -> np.ndarray:
    """The one channel of a mask [..., H, W, 3] without colours; JPEG may have tinted it."""
    if array.ndim == 2 or array.shape[-1] != 3:
        return array
    low, high = array.min(axis=-1), array.max(axis=-1)
    if (high.astype(np.int64) - low).max(initial=0) > (JPEG_TINT if lossy else 0):
        raise CaseError(
            f"{path}: a mask must be a palette or grey picture, found mode {mode} with colours; save the label values "
            "as grey, or say which colour is which label in labels.json (EndoVis)."
        )
    return np.ascontiguousarray(array[..., 1])


def grey_if_equal(frames: np.ndarray) -> np.ndarray:
    """[T, H, W] where the three channels of [T, H, W, 3] are equal everywhere, else the frames unchanged."""
    if frames.ndim == 4:
        for frame in frames:
            if not (np.array_equal(frame[..., 0], frame[..., 1]) and np.array_equal(frame[..., 0], frame[..., 2])):
                return frames
        return np.ascontiguousarray(frames[..., 0])
    return frames


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """A picture whose header is read; whatever Pillow says of it becomes a `CaseError` with the file's name."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_size` decides
            picture = Image.open(path)
        with picture:
            yield picture
    except CaseError:
        raise
    except Image.DecompressionBombError as error:
        raise CaseError(f"{path}: too many pixels ({error}); more than the limit of one picture: tile it.") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise CaseError(f"{path}: not readable as a picture ({error}); copy or export it again.") from None


def _pixels(path: Path, picture: Image) -> np.ndarray:
    if "A" in picture.getbands() or "transparency" in picture.info:
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
        _warn_of_alpha(path, bool((alpha < 255).any()))
    if picture.mode in ("F", "I") or picture.mode.startswith("I;16"):
        array = np.asarray(picture)
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.asarray(picture.convert("L" if picture.mode in ("L", "1", "LA") else "RGB"))


def _deep_colour(path: Path) -> bool:
    """Whether a PNG has 16 bits a channel and more than one, which Pillow would cut to 8."""
    if path.suffix.lower() != ".png":
        return False
    with open(path, "rb") as file:
        head = file.read(26)
    return head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 26 and head[24] == 16 and head[25] in (2, 4, 6)


def _deep_pixels(path: Path) -> np.ndarray:
    import imagecodecs

    try:
        array = np.asarray(imagecodecs.png_decode(path.read_bytes()))
    except RuntimeError as error:
        raise CaseError(f"{path}: not readable as a picture ({error}); copy or export it again.") from None
    if array.shape[-1] in (2, 4):
        _warn_of_alpha(path, bool((array[..., -1] < 65535).any()))
    return np.ascontiguousarray(array[..., :3] if array.shape[-1] >= 3 else array[..., 0])


def _only_page(path: Path, count: int, mask: bool) -> np.ndarray:
    tiff = read_tiff(path, DatasetSettings(), mask, count)
    if tiff.array.shape[0] != 1:
        raise CaseError(f"{path}: {tiff.array.shape[0]} pages where one frame is expected; save one page a file.")
    _warn_of_alpha(path, tiff.translucent)
    return np.asarray(tiff.array[0])


def _warn_of_alpha(path: Path, translucent: bool) -> None:
    if translucent:
        warnings.warn(f"{path.name}: its transparency was dropped, the colours below it are kept.", CaseWarning, 3)
