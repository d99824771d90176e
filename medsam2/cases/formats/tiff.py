"""TIFF files through tifffile: one page or many, what their axes mean (ImageJ, OME) and how large their pixels are."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.raster import Raster, check_size, explain
from medsam2.cases.settings import DatasetSettings

if TYPE_CHECKING:
    import tifffile

SUSPECT_BYTES, MAX_DEFLATE_RATIO = 1 << 30, 1100
"""A larger file whose ratio exceeds what deflate can reach is refused as a decompression bomb."""
LOSSY_COMPRESSIONS = (6, 7, 33003, 33004, 33005, 34892, 34933, 50001, 52546)
"""TIFF compression codes that change values: JPEG, JPEG 2000, lossy DNG, WebP, JPEG XL."""
SCREEN_DPI = (72.0, 96.0, 100.0, 150.0, 200.0, 300.0, 600.0, 1200.0)
"""Default resolutions of programs, which say nothing about the size of the pictured object."""
MM_PER_UNIT = {
    "nm": 1e-6, "nanometer": 1e-6, "um": 1e-3, "µm": 1e-3, "μm": 1e-3, "\\u00b5m": 1e-3, "micron": 1e-3,
    "microns": 1e-3, "micrometer": 1e-3, "mm": 1.0, "millimeter": 1.0, "cm": 10.0, "centimeter": 10.0, "m": 1000.0,
    "inch": 25.4,
}  # fmt: skip


def read_tiff(path: Path, settings: DatasetSettings, mask: bool = False, count: int = 1) -> tuple[Raster, bool, bool]:
    """Read all full-size pages of a TIFF in their native type, without thumbnails and lower levels of a pyramid.

    Args:
        mask: keep palette indices instead of their colours. count: number of such files to hold in memory together.

    Returns:
        The pages, whether their compression is lossy (`LOSSY_COMPRESSIONS`), and whether transparency was dropped.

    Raises:
        CaseError: cut short, damaged, too large, pages of unequal size, or both time and slices.
    """
    import tifffile

    # a description can name other files, which must not be opened
    with _explain_tiff(path), tifffile.TiffFile(path, _multifile=False) as file:
        series = [entry for entry in file.series if not int(entry.keyframe.subfiletype) & 0b101]
        if not series:
            raise CaseError(f"{path}: holds no full-size page; export it again.")
        if len(series) > 1:
            sizes = ", ".join(sorted({f"{entry.shape} {entry.dtype}" for entry in series}))
            raise CaseError(f"{path}: its pages differ: {sizes}; export one image or stack per file.")
        stack = series[0]
        if file.is_ome and stack.kind != "ome":
            raise CaseError(
                f"{path}: its OME description does not fit the pages in it (TiffData); export it again, as one file."
            )
        _check_complete(path, stack, count)
        array, axes = _pixels(path, stack, mask)
        array, translucent = _drop_alpha(path, array, axes)
        array, moving = _to_slices(path, array, axes.replace("S", ""), settings)
        step, y, x = _spacing(path, file, stack.keyframe, moving)
        lossy = int(stack.keyframe.compression) in LOSSY_COMPRESSIONS
        return Raster(array, (step, y, x), path, moving=moving), lossy, translucent


@contextmanager
def _explain_tiff(path: Path) -> Iterator[None]:
    """Turn every error of tifffile, including those that it only logs, into a `CaseError`."""
    import tifffile

    class Refuse(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                raise tifffile.TiffFileError(record.getMessage())

    logger, refuse = logging.getLogger("tifffile"), Refuse()
    logger.addHandler(refuse)
    try:
        with explain(path, f"damaged or cut short at {path.stat().st_size} bytes", "copy or export it again"):
            yield
    finally:
        logger.removeHandler(refuse)


def _check_complete(path: Path, stack: tifffile.TiffPageSeries, count: int) -> None:
    """Refuse a file that is cut short or does not fit in memory, before it is unpacked."""
    stored = path.stat().st_size
    size = math.prod(stack.shape) * stack.dtype.itemsize
    check_size(path, size * count)
    if size > SUSPECT_BYTES and size > MAX_DEFLATE_RATIO * stored:
        shape = " x ".join(map(str, stack.shape))
        raise CaseError(
            f"{path}: {stored} bytes that claim to be {shape} pixels, more than compression can reach; export it "
            "again, or check where it comes from."
        )
    pages = [page for page in stack.pages if page is not None]
    if len(pages) < len(stack.pages):
        raise CaseError(f"{path}: its description names {len(stack.pages)} pages, found {len(pages)}; export it again.")
    ends = [start + size for page in pages for start, size in zip(page.dataoffsets, page.databytecounts, strict=False)]
    if max(ends, default=0) > stored:
        raise CaseError(f"{path}: cut short: {stored} bytes, but its pixels end at {max(ends)}; copy it again.")


def _pixels(path: Path, stack: tifffile.TiffPageSeries, mask: bool) -> tuple[np.ndarray, str]:
    """Read pixels as colours or grey values (palette indices of a mask), and their axes with samples (S) last."""
    import imagecodecs

    page, axes = stack.keyframe, stack.axes
    if int(page.photometric) in (5, 6, 8):  # CMYK, YCbCr and CIELAB become RGB
        content = path.read_bytes()
        pages = [imagecodecs.tiff_decode(content, index=entry.index, asrgb=True) for entry in stack.pages if entry]
        axes = "".join(axis for axis in axes if axis not in "SYX") + "YXS"
        lengths = [n for axis, n in zip(stack.axes, stack.shape, strict=True) if axis not in "SYX"]
        array = np.stack(pages).reshape(*lengths, *pages[0].shape)
    else:
        array = stack.asarray()
        if array.shape != stack.shape:
            raise CaseError(
                f"{path}: its description names pixels of shape {stack.shape}, its pages hold {array.shape}; export it "
                "again."
            )
    if "S" in axes:
        array = np.moveaxis(array, axes.index("S"), -1)
        axes = axes.replace("S", "") + "S"
    if array.dtype.kind not in "iufb":
        raise CaseError(f"{path}: its pixels are {array.dtype}; expected whole numbers or fractions.")
    if page.photometric == 0 and (not mask or page.bitspersample == 1) and array.dtype.kind in "ub":
        # white is zero: invert pictures and one-bit masks, but not masks whose values are labels
        array = ~array if array.dtype == np.bool_ else np.iinfo(array.dtype).max - array
    if page.photometric == 3 and not mask and page.colormap is not None:
        array, axes = (np.asarray(page.colormap).T >> 8).astype(np.uint8)[array], axes + "S"
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(1 if mask else 255)
    return array.astype(array.dtype.newbyteorder("="), copy=False), axes


def _drop_alpha(path: Path, array: np.ndarray, axes: str) -> tuple[np.ndarray, bool]:
    """Return the array [...] or [..., 3] without alpha, and whether a pixel was transparent."""
    if "S" not in axes:
        return array, False
    samples = array.shape[-1]
    if samples > 4:
        raise CaseError(f"{path}: {samples} samples per pixel; expected grey or RGB, export one channel per file.")
    alpha = array[..., -1] if samples in (2, 4) else None
    opaque = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1
    translucent = alpha is not None and bool((alpha != opaque).any())
    return array[..., 0] if samples < 3 else array[..., :3], translucent


def _to_slices(path: Path, array: np.ndarray, axes: str, settings: DatasetSettings) -> tuple[np.ndarray, bool]:
    """Arrange an array with the given axes as [Z, Y, X] or [Z, Y, X, 3], and return whether Z is time."""
    lengths = dict(zip(axes, array.shape, strict=False))
    stacked = {axis: length for axis, length in lengths.items() if axis not in "CYX" and length > 1}
    if len(stacked) > 1:
        lengths_text = " and ".join(f"{length} along {axis}" for axis, length in stacked.items())
        raise CaseError(f"{path}: {lengths_text}; save each time as a separate file.")
    channels = lengths.get("C", 1)
    channel_stacks = np.moveaxis(array, axes.index("C"), 0) if "C" in axes else array[None]
    channel_stacks = channel_stacks.reshape(channels, -1, lengths["Y"], lengths["X"], *array.shape[len(axes) :])
    if channels == 1 or settings.channels == "first":
        array = channel_stacks[0]
    elif settings.channels == "rgb" and channels == 3 and channel_stacks.ndim == 4:
        array = np.moveaxis(channel_stacks, 0, -1)
    else:
        raise CaseError(
            f"{path}: {channels} channels in one file; set `channels: first`{' or rgb' if channels == 3 else ''} "
            "in --config, or save one channel per file."
        )
    return np.ascontiguousarray(array), "T" in stacked


def _spacing(path: Path, file: tifffile.TiffFile, page: tifffile.TiffPage, moving: bool) -> tuple[float, float, float]:
    """Return (z in mm or seconds, y, x in mm); 1.0 for what the file does not state."""
    slices = seconds = 0.0
    per_unit, unit = page.resolution[::-1], {2: 25.4, 3: 10.0}.get(int(page.resolutionunit), 0.0)
    measured = bool(unit) and min(per_unit) > 1 and round(per_unit[1] * 25.4 / unit) not in (0, *SCREEN_DPI)
    metadata: dict[str, Any] = {}
    try:
        if file.is_imagej:
            metadata = file.imagej_metadata or {}
            scale = MM_PER_UNIT.get(str(metadata.get("unit", "")).strip().lower(), 0.0)
            rate = abs(float(metadata.get("fps", 0)))
            slices = abs(float(metadata.get("spacing", 0))) * scale
            seconds = abs(float(metadata.get("finterval", 0))) or (1 / rate if rate else 0.0)
            unit, measured = (scale, True) if scale else (unit, measured)
        elif file.is_ome and (pixels_element := re.search(r"<(?:\w+:)?Pixels[^>]*>", file.ome_metadata or "")):
            metadata = dict(re.findall(r'(\w+)="([^"]*)"', pixels_element[0]))
            lengths = (float(metadata.get(f"PhysicalSize{axis}", 0)) for axis in "ZYX")
            scales = (MM_PER_UNIT.get(metadata.get(f"PhysicalSize{axis}Unit", "µm"), 0.0) for axis in "ZYX")
            slices, y, x = (length * scale for length, scale in zip(lengths, scales, strict=True))
            seconds = float(metadata.get("TimeIncrement", 0))
            if x > 0 and y > 0:
                per_unit, unit, measured = (1 / y, 1 / x), 1.0, True
    except ValueError as error:
        raise CaseError(f"{path}: its description is damaged ({error}); export it again.") from None
    valid = measured and min(per_unit) > 0 and all(map(math.isfinite, per_unit))
    y, x = (unit / per_unit[0], unit / per_unit[1]) if valid else (1.0, 1.0)
    return (seconds if moving else slices) or (1.0 if moving else max(1.0, y, x)), y, x
