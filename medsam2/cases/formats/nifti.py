"""The voxels of a NIfTI file, checked to the last byte.

SimpleITK reads a NIfTI file that is cut short without a word and fills the rest with zeros, so the bytes are
unpacked and counted here; SimpleITK still says where the voxels lie (qform, sform), see `volume`.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.raster import MAX_BYTES, check_readable, check_size

DATATYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8", 128: "u1",
}  # fmt: skip
RGB24 = 128
HEADER = 540
CHUNK = 1 << 20


@dataclass(frozen=True)
class Header:
    """What is needed to find the voxels: `shape` (x, y, z[, n]), little- or big-endian `dtype`, components, scaling."""

    shape: tuple[int, ...]
    dtype: np.dtype
    components: int
    offset: int
    slope: float
    intercept: float

    @property
    def size(self) -> int:
        """Bytes of all voxels."""
        return math.prod(self.shape) * self.components * self.dtype.itemsize


def read_voxels(path: Path, limit: int = MAX_BYTES) -> np.ndarray:
    """Voxels [z, y, x] (or [z, y, x, 3], or [n, z, y, x] of a 4-D file) of a `.nii` or `.nii.gz`, scaled as it says.

    Raises:
        CaseError: not NIfTI, cut short, damaged, beyond `limit`, more than four dimensions, or of a complex type.
    """
    header = parse_header(path, _start(path))
    check_size(path, header.size, limit)
    wanted = header.offset + header.size
    content = _unpacked(path, wanted) if _gzipped(path) else _plain(path, wanted)
    if len(content) < wanted:
        raise CaseError(
            f"{path}: cut short: its header promises {header.size} bytes of voxels {header.shape}, it holds "
            f"{max(0, len(content) - header.offset)}; copy it again."
        )
    shape = header.shape[::-1] if header.components == 1 else (*header.shape[::-1], header.components)
    array = np.frombuffer(content, header.dtype, math.prod(shape), header.offset).reshape(shape)
    return _scaled(array.astype(header.dtype.newbyteorder("="), copy=False), header)


def parse_header(path: Path, start: bytes) -> Header:
    """The header in the first bytes of a NIfTI-1 or NIfTI-2 file."""
    for order in "<>":
        length = struct.unpack_from(f"{order}i", start)[0] if len(start) >= 4 else 0
        if length == 348 and len(start) >= 348:
            dims = struct.unpack_from(f"{order}8h", start, 40)
            datatype = struct.unpack_from(f"{order}h", start, 70)[0]
            offset, slope, intercept = struct.unpack_from(f"{order}3f", start, 108)
            steps, sform = struct.unpack_from(f"{order}3f", start, 80), struct.unpack_from(f"{order}h", start, 254)[0]
        elif length == 540 and len(start) >= 540:
            dims = struct.unpack_from(f"{order}8q", start, 16)
            datatype = struct.unpack_from(f"{order}h", start, 12)[0]
            offset, slope, intercept = struct.unpack_from(f"{order}q2d", start, 168)
            steps, sform = struct.unpack_from(f"{order}3d", start, 112), struct.unpack_from(f"{order}i", start, 348)[0]
        else:
            continue
        rank, sizes = dims[0], dims[1 : 1 + max(0, dims[0])]
        if not 1 <= rank <= 7 or any(n < 1 for n in sizes) or not 0 <= offset < 1 << 40:
            raise CaseError(f"{path}: its header is damaged (dimensions {dims}, offset {offset}); copy it again.")
        if any(n != 1 for n in sizes[4:]) or (datatype == RGB24 and any(n != 1 for n in sizes[3:])):
            raise CaseError(f"{path}: {rank}-D image of size {sizes}; split it into 3-D files.")
        if sform <= 0 and any(not (math.isfinite(step) and step > 0) for step in steps[: min(rank, 3)]):
            # SimpleITK would take 1 mm in its place, or drop the sign
            raise CaseError(f"{path}: spacing {steps[: min(rank, 3)]} must be positive; mend the header.")
        if datatype not in DATATYPES:
            raise CaseError(f"{path}: NIfTI data type {datatype} is not read; save it as integer or float.")
        shape = (*sizes[:3], 1, 1)[:3] + (sizes[3:4] if sizes[3:4] and sizes[3] > 1 else ())
        dtype = np.dtype(order + DATATYPES[datatype])
        return Header(shape, dtype, 3 if datatype == RGB24 else 1, int(offset), float(slope), float(intercept))
    raise CaseError(f"{path}: no NIfTI header in its {path.stat().st_size} bytes; it is cut short or something else.")


def nifti_shape(path: Path) -> tuple[int, ...]:
    """(x, y, z), or (x, y, z, n) of a 4-D file, from the header alone."""
    check_readable(path)
    return parse_header(path, _start(path)).shape


def seconds_a_unit(path: Path) -> float:
    """Seconds of one unit of the fourth spacing (`xyzt_units`: s, ms or us; seconds where it does not say)."""
    start = _start(path)
    at = 500 if struct.unpack_from("<i", start)[0] in (540, 0x1C020000) else 123
    units = (start[at] if len(start) > at else 0) & 0x38
    return {16: 1e-3, 24: 1e-6}.get(units, 1.0)


def _scaled(array: np.ndarray, header: Header) -> np.ndarray:
    """Stored values through slope and intercept; whole numbers stay integers (CT saved with intercept -1024)."""
    slope, intercept = header.slope, header.intercept
    usable = math.isfinite(slope) and math.isfinite(intercept) and slope != 0
    if not usable or (slope, intercept) == (1, 0) or header.components != 1:
        return array
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 2 and slope.is_integer() and intercept.is_integer():
        bounds = [int(v) * slope + intercept for v in (np.iinfo(array.dtype).min, np.iinfo(array.dtype).max)]
        if max(map(abs, bounds)) < 2**31:
            return array.astype(np.int32) * np.int32(slope) + np.int32(intercept)
    return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _gzipped(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _start(path: Path) -> bytes:
    """As many of the first 540 bytes as there are."""
    if not _gzipped(path):
        with open(path, "rb") as file:
            return file.read(HEADER)
    with gzip.open(path) as file:
        try:
            return file.read(HEADER)
        except (EOFError, OSError, zlib.error):
            return b""


def _plain(path: Path, wanted: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(wanted)


def _unpacked(path: Path, wanted: int) -> bytes | bytearray:
    return _gunzip_at_once(path, wanted) or _gunzip(path, wanted)


def _gunzip_at_once(path: Path, wanted: int) -> bytes:
    """The whole stream through libdeflate, twice as fast as zlib; empty unless it is sound and has `wanted` bytes."""
    import imagecodecs

    try:
        content = bytes(imagecodecs.gzip_decode(path.read_bytes(), out=wanted))
    except (RuntimeError, ValueError, MemoryError):
        return b""  # cut short, damaged, longer or in several members: `_gunzip` finds out which
    return content if len(content) == wanted else b""


def _gunzip(path: Path, wanted: int) -> bytearray:
    """The first `wanted` unpacked bytes, fewer where the file ends; nothing beyond them is kept.

    Where the stream ends with them, its checksum is verified.
    """
    content = bytearray()
    try:
        with gzip.open(path) as file:
            while len(content) < wanted and (chunk := file.read(min(CHUNK, wanted - len(content)))):
                content += chunk
            file.read(1)  # the checksum is read with the end of the stream
    except EOFError:
        if len(content) >= wanted:
            raise CaseError(f"{path}: cut short: the checksum at its end is missing; copy it again.") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        trailing = len(content) >= wanted and "Not a gzipped file" in str(error)  # something follows the stream
        if not trailing:
            raise CaseError(f"{path}: damaged after {len(content)} unpacked bytes ({error}); copy it again.") from None
    return content
