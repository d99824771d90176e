"""TIFF files: one page or many, what their pages mean (ImageJ, OME) and how large their pixels are."""

from __future__ import annotations

import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.limits import MAX_BYTES, check_size
from medsam2.cases.settings import DatasetSettings

MAX_PAGES = 100_000
SUSPECT, MOST_RATIO = 1 << 30, 1100
"""Bytes from which on a file that packs more of them into one than deflate can is taken for a bomb."""
LOSSY = (6, 7, 33003, 33004, 33005, 34892, 34933, 50001, 52546)
"""Compressions that change values: JPEG, JPEG 2000, lossy DNG, WebP, JPEG XL."""
SCREEN_DPI = (72.0, 96.0, 100.0, 150.0, 200.0, 300.0, 600.0, 1200.0)
"""What programs write when nobody measured anything; it says nothing of the size of what was pictured."""
MM = {
    "nm": 1e-6, "nanometer": 1e-6, "um": 1e-3, "µm": 1e-3, "μm": 1e-3, "\\u00b5m": 1e-3, "micron": 1e-3,
    "microns": 1e-3, "micrometer": 1e-3, "mm": 1.0, "millimeter": 1.0, "cm": 10.0, "centimeter": 10.0, "m": 1000.0,
    "inch": 25.4,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tiff:
    """A TIFF's pages as [Z, Y, X] or [Z, Y, X, 3]; spacing (z mm or seconds, y, x mm), 1.0 where it does not say.

    Attributes:
        translucent: whether an alpha channel that is not opaque everywhere was dropped. lossy: see `LOSSY`.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    moving: bool
    lossy: bool
    translucent: bool


@dataclass(frozen=True)
class _Stack:
    """What the pages are: `order` lists the axes from the fastest, `counts` how long each is."""

    order: str = "czt"
    counts: tuple[int, int, int] = (1, 1, 1)
    spacing: tuple[float, float] = (0.0, 0.0)
    pixels: tuple[float, float] = (0.0, 0.0)
    known: bool = False


def read_tiff(path: Path, settings: DatasetSettings, mask: bool = False, limit: int = MAX_BYTES) -> Tiff:
    """All pages of a TIFF in their native type; thumbnails and the lower levels of a pyramid are left out.

    Args:
        mask: keep palette indices instead of their colours.

    Raises:
        CaseError: cut short, damaged, too large, pages of unequal size, or channels and a time axis beside slices.
    """
    pages = [(n, page) for n, page in enumerate(_directories(path)) if not int(_one(page, 254, 0)) & 0b101]
    if not pages:
        raise CaseError(f"{path}: holds no full-size page; export it again.")
    first = pages[0][1]
    stack = _stack(path, str(first.get(270) or ""), len(pages))
    sizes = {_size(page) for _, page in pages}
    if len(sizes) > 1:
        found = ", ".join(f"{w}x{h} ({s} samples of {b} bits)" for w, h, s, b in sorted(sizes))
        raise CaseError(f"{path}: its pages differ: {found}; export one image or stack a file.")
    width, height, samples, bits = sizes.pop()
    total = stack.counts[0] * stack.counts[1] * stack.counts[2] if stack.known else len(pages)
    size = width * height * samples * max(8, bits) // 8 * max(total, len(pages))
    check_size(path, size, limit)
    if size > SUSPECT and size > MOST_RATIO * path.stat().st_size:
        raise CaseError(
            f"{path}: {path.stat().st_size} bytes that claim to be {width} x {height} pixels on "
            f"{max(total, len(pages))} pages, more than a picture can be compressed: export it again, or check that it "
            "is what it claims to be."
        )
    if stack.known and total != len(pages):
        if len(pages) != 1:
            raise CaseError(f"{path}: its description names {total} pages, found {len(pages)}; export it again.")
        array = _contiguous(path, first, total, (height, width))
    else:
        array = np.stack(_decoded(path, pages, mask))
    array, translucent = _without_alpha(path, array, samples)
    array, moving = _arranged(path, array, stack, settings)
    y, x = _pixels(first, stack)
    slices, seconds = stack.spacing
    step = (seconds if moving else slices) or (1.0 if moving else max(1.0, y, x))
    lossy = any(int(_one(page, 259, 1)) in LOSSY for _, page in pages)
    return Tiff(array, (step, y, x), moving, lossy, translucent)


def _directories(path: Path) -> list[dict[int, Any]]:
    """The tags of every page, without any pixel."""
    from PIL import TiffImagePlugin

    pages: list[dict[int, Any]] = []
    seen: set[int] = set()
    size = path.stat().st_size
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is cut short shows in the tags, and is an error here
            head = file.read(8)
            if head[2:3] == b"\x2b" or head[3:4] == b"\x2b":
                head += file.read(8)
            directory = TiffImagePlugin.ImageFileDirectory_v2(head)
            while directory.next:
                at = directory.next
                if at in seen or len(pages) >= MAX_PAGES:
                    raise CaseError(f"{path}: its list of pages has no end; export it again.")
                if at + 6 > size:
                    raise CaseError(f"{path}: cut short: {size} bytes, but page {len(pages) + 1} starts at {at}.")
                seen.add(at)
                file.seek(at)
                directory.load(file)
                pages.append({tag: directory.get(tag) for tag in directory})
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, struct.error) as error:
        raise CaseError(f"{path}: damaged or cut short at {size} bytes ({error}); copy it again.") from None
    if not pages:
        raise CaseError(f"{path}: damaged or cut short at {size} bytes: no page in it; copy it again.")
    if any(256 not in page or 257 not in page for page in pages):
        raise CaseError(f"{path}: damaged or cut short at {size} bytes: a page without a size; copy it again.")
    return pages


def _one(page: dict[int, Any], tag: int, default: float) -> float:
    """The first number of a tag."""
    value = page.get(tag, default)
    while isinstance(value, tuple) and value:
        value = value[0]
    try:
        return float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return float(default)


def _size(page: dict[int, Any]) -> tuple[int, int, int, int]:
    """(width, height, samples a pixel, bits a sample)."""
    return int(_one(page, 256, 0)), int(_one(page, 257, 0)), int(_one(page, 277, 1)), int(_one(page, 258, 1))


def _decoded(path: Path, pages: list[tuple[int, dict[int, Any]]], mask: bool) -> list[np.ndarray]:
    import imagecodecs

    content, arrays = path.read_bytes(), []
    for number, page in pages:
        width, height, samples, bits = _size(page)
        photometric = int(_one(page, 262, 1))
        try:
            array = imagecodecs.tiff_decode(content, index=number, asrgb=photometric in (5, 6, 8))
        except (RuntimeError, ValueError, TypeError, IndexError, MemoryError) as error:
            raise CaseError(
                f"{path}: page {number + 1} is not readable ({error}); copy it again, or save it uncompressed."
            ) from None
        if int(_one(page, 284, 1)) == 2 and samples > 1 and array.shape[0] == samples:
            array = np.moveaxis(array, 0, -1)
        if array.shape[:2] != (height, width) or array.dtype.kind not in "iufb":
            raise CaseError(f"{path}: page {number + 1} is {array.dtype} {array.shape}, not {height} x {width} pixels.")
        if photometric == 0 and (not mask or bits == 1) and array.dtype.kind in "ub":
            # white is zero: a picture is turned back; in a mask only of one bit, greater values are labels
            array = ~array if array.dtype == np.bool_ else np.iinfo(array.dtype).max - array
        if photometric == 3 and not mask and page.get(320) and array.ndim == 2:
            array = (np.array(page[320], np.uint32).reshape(3, -1).T >> 8).astype(np.uint8)[array]
        if array.dtype == np.bool_:
            array = array.astype(np.uint8) * (1 if mask else 255)
        arrays.append(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))
    return arrays


def _contiguous(path: Path, page: dict[int, Any], count: int, shape: tuple[int, int]) -> np.ndarray:
    """ImageJ's stacks of which the first page alone is listed: the others follow it, uncompressed."""
    width, height, samples, bits = _size(page)
    kinds = {(1, 8): "u1", (1, 16): "u2", (1, 32): "u4", (3, 32): "f4", (2, 16): "i2", (2, 8): "i1"}
    kind = kinds.get((int(_one(page, 339, 1)), bits))
    if kind is None or samples != 1 or int(_one(page, 259, 1)) != 1:
        raise CaseError(f"{path}: its description names {count} pages, but the file lists one; export it again.")
    with open(path, "rb") as file:
        stored = np.dtype(kind).newbyteorder("<" if file.read(2) == b"II" else ">")
        file.seek(int(_one(page, 273, 0)))
        wanted = count * shape[0] * shape[1]
        array = np.fromfile(file, stored, wanted)
    if array.size != wanted:
        raise CaseError(f"{path}: cut short: {array.size} of {wanted} pixels; copy it again.")
    return array.astype(np.dtype(kind)).reshape(count, *shape)


def _without_alpha(path: Path, array: np.ndarray, samples: int) -> tuple[np.ndarray, bool]:
    """[Z, Y, X] or [Z, Y, X, 3], and whether something was seen through."""
    if array.ndim == 3:
        return array, False
    if array.ndim != 4 or array.shape[-1] not in (1, 2, 3, 4):
        raise CaseError(f"{path}: {samples} samples a pixel; expected grey or RGB, export one channel a file.")
    channels = array.shape[-1]
    alpha = array[..., -1] if channels in (2, 4) else None
    opaque = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1
    translucent = alpha is not None and bool((alpha != opaque).any())
    array = array[..., 0] if channels < 3 else array[..., :3]
    return np.ascontiguousarray(array), translucent


def _stack(path: Path, description: str, pages: int) -> _Stack:
    """The axes of the pages, as ImageJ or OME describes them."""
    if description.startswith("ImageJ="):
        values = dict(line.partition("=")[::2] for line in description.splitlines())

        def number(key: str, default: float) -> float:
            try:
                return abs(float(values.get(key, default)))
            except ValueError:
                return default

        counts = tuple(int(number(key, 1)) or 1 for key in ("channels", "slices", "frames"))
        images = int(number("images", 1)) or 1
        if counts == (1, 1, 1) and images > 1:
            counts = (1, images, 1)
        unit = MM.get(values.get("unit", "").strip().lower(), 0.0)
        seconds = number("finterval", 0.0) or (1.0 / number("fps", 0.0) if number("fps", 0.0) else 0.0)
        # the resolution holds pixels a unit; `pixels` carries the unit's length until the page is read
        return _Stack("czt", (counts[0], counts[1], counts[2]), (number("spacing", 0.0) * unit, seconds), (unit, unit),
                      known=True)  # fmt: skip
    if "<Pixels" in description and "SizeZ" in description:
        return _ome(path, description, pages)
    return _Stack()


def _ome(path: Path, description: str, pages: int) -> _Stack:
    tag = description[description.index("<Pixels") :].partition(">")[0]
    values = dict(re.findall(r'(\w+)="([^"]*)"', tag))
    try:
        colours = int(values.get("SizeC", 1))
        counts = (colours, int(values["SizeZ"]), int(values.get("SizeT", 1)))
        if counts[0] * counts[1] * counts[2] != pages and counts[1] * counts[2] == pages:
            counts = (1, *counts[1:])  # the channels are samples of a pixel
        sizes = {
            axis: float(values.get(f"PhysicalSize{axis}", 0)) * MM.get(values.get(f"PhysicalSize{axis}Unit", "µm"), 0.0)
            for axis in "ZYX"
        }
        seconds = float(values.get("TimeIncrement", 0.0))
    except ValueError as error:
        raise CaseError(f"{path}: its OME description is damaged ({error}); export it again.") from None
    order = values.get("DimensionOrder", "XYCZT").lower().replace("x", "").replace("y", "")
    return _Stack(order if sorted(order) == ["c", "t", "z"] else "czt", counts, (sizes["Z"], seconds),
                  (-sizes["Y"], -sizes["X"]), known=True)  # fmt: skip


def _arranged(path: Path, array: np.ndarray, stack: _Stack, settings: DatasetSettings) -> tuple[np.ndarray, bool]:
    """[Z, Y, X(, 3)] of the pages, and whether Z is time."""
    if not stack.known:
        return array, False
    channels, slices, frames = stack.counts
    if slices > 1 and frames > 1:
        raise CaseError(f"{path}: {frames} frames of {slices} slices; save each time as a file of its own.")
    if channels > 1:
        length = dict(zip("czt", stack.counts, strict=True))
        parts = array.reshape(*(length[axis] for axis in reversed(stack.order)), *array.shape[1:])
        parts = np.moveaxis(parts, stack.order[::-1].index("c"), 0).reshape(channels, -1, *array.shape[1:])
        if settings.channels == "first":
            array = np.ascontiguousarray(parts[0])
        elif settings.channels == "rgb" and channels == 3 and parts.ndim == 4:
            array = np.ascontiguousarray(np.moveaxis(parts, 0, -1))
        else:
            raise CaseError(
                f"{path}: {channels} channels in one file; say `channels: first`{' or rgb' if channels == 3 else ''} "
                "in --config, or save one channel a file."
            )
    return array, frames > 1


def _pixels(page: dict[int, Any], stack: _Stack) -> tuple[float, float]:
    """(y, x) in mm, 1.0 where the file does not say."""
    if stack.pixels[0] < 0 and stack.pixels[1] < 0:  # OME states the size itself
        return -stack.pixels[0], -stack.pixels[1]
    unit = stack.pixels[0] or {2: 25.4, 3: 10.0}.get(int(_one(page, 296, 2)), 0.0)
    per_unit = _one(page, 283, 0.0), _one(page, 282, 0.0)
    stated = stack.pixels[0] > 0 or (min(per_unit) > 1 and round(per_unit[1] * 25.4 / unit if unit else 0, 0))
    if not unit or min(per_unit) <= 0 or not np.isfinite(per_unit).all() or not stated:
        return 1.0, 1.0
    if stack.pixels[0] <= 0 and round(per_unit[1] * 25.4 / unit) in SCREEN_DPI:
        return 1.0, 1.0
    return unit / per_unit[0], unit / per_unit[1]
