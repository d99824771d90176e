"""NIfTI, NRRD, MHA and MHD: 3-D scans, and 4-D ones as clips in time or as channels.

SimpleITK fills a NIfTI file that is cut short with zeros and reports nothing. NIfTI voxels are therefore unpacked and
counted here; their affine (qform, sform) still comes from SimpleITK.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.geometry import affine_from_itk
from medsam2.cases.raster import MaskRaster, Raster, check_readable, check_size, explain
from medsam2.cases.settings import DatasetSettings
from medsam2.cases.values import as_labels

if TYPE_CHECKING:
    import SimpleITK as sitk

NAME = "volume"
READS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd)"
ITK_READERS = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
HEADER_FIELDS = ["dims", "datatype", "steps", "offset", "slope", "intercept", "units", "qform", "sform"]
NIFTI1_TYPES = ["8i2", "i2", "8f4", "f4", "f4", "f4", "u1", "i2", "i2"]
NIFTI1_OFFSETS = [40, 70, 76, 108, 112, 116, 123, 252, 254]
NIFTI2_TYPES = ["8i8", "i2", "8f8", "i8", "f8", "f8", "i4", "i4", "i4"]
NIFTI2_OFFSETS = [16, 12, 104, 168, 176, 184, 500, 344, 348]
NIFTI_HEADERS = {
    348: np.dtype({"names": HEADER_FIELDS, "formats": NIFTI1_TYPES, "offsets": NIFTI1_OFFSETS, "itemsize": 348}),
    540: np.dtype({"names": HEADER_FIELDS, "formats": NIFTI2_TYPES, "offsets": NIFTI2_OFFSETS, "itemsize": 540}),
}
"""Header size in bytes -> fields that are read, for NIfTI-1 and NIfTI-2."""
NIFTI_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8", 128: "u1",
}  # fmt: skip
RGB24_CODE = 128
SECONDS_PER_UNIT = {16: 1e-3, 24: 1e-6}
"""Time unit of `xyzt_units` -> seconds; any other code means seconds."""
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Grid:
    """An array in the axis order of the file, and its position.

    Attributes:
        array: [Z, Y, X], [Z, Y, X, 3], or [N, Z, Y, X] of a 4-D file (`is_4d`).
        spacing: (z, y, x) in mm. affine: RAS+, or None if the file states none.
        step: spacing of the fourth axis in seconds; 1.0 if unknown.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray | None
    is_4d: bool
    step: float


@dataclass(frozen=True)
class NiftiHeader:
    """Layout and scaling of the voxels of a NIfTI file.

    Attributes:
        shape: (x, y, z), or (x, y, z, n) of a 4-D file. dtype: little- or big-endian. components: 3 for RGB, else 1.
        offset: bytes before the first voxel. slope, intercept: scaling of the stored values.
        seconds: length of one time unit of the fourth axis. has_position: whether the file has a qform or sform.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    components: int
    offset: int
    slope: float
    intercept: float
    seconds: float
    has_position: bool

    @property
    def size(self) -> int:
        """Size of all voxels in bytes."""
        return math.prod(self.shape) * self.components * self.dtype.itemsize


def recognises(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(tuple(ITK_READERS))


def read(path: Path, settings: DatasetSettings) -> Raster:
    """Read a 3-D scan.

    Raises:
        CaseError: unreadable or cut short, too large, 4-D, or of invalid spacing.
    """
    grid = read_grid(path)
    if grid.is_4d:
        raise CaseError(
            f"{path}: 4-D image of shape {grid.array.shape}, where one volume is expected; give a series in time "
            "a 4-D mask, or split other files into 3-D files."
        )
    return Raster(grid.array, grid.spacing, path, grid.affine)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """Read a 3-D label map as one plane; fractions are kept until `threshold` is applied."""
    grid = read_grid(path)
    if grid.is_4d or grid.array.ndim != 3:
        raise CaseError(f"{path}: a mask must be 3-D with one value per voxel, found shape {grid.array.shape}.")
    return MaskRaster(as_labels(grid.array, path)[None], path, grid.affine)


def count_time_slices(path: Path) -> int:
    """Return the number of slices of a 4-D file, each a clip in time, from its header; 0 for any other file."""
    if not recognises(path):
        return 0
    size = read_nifti_header(path).shape if _is_nifti(path) else _open_with_itk(path).GetSize()
    return int(size[2]) if len(size) > 3 and size[3] > 1 else 0


def read_time_slice(path: Path, z: int) -> Raster:
    """Read slice `z` of a 4-D file over time as [T, Y, X] with spacing (seconds, mm, mm)."""
    grid = _read_4d_grid(path, z, 1)
    return Raster(np.ascontiguousarray(grid.array[:, z]), (grid.step, *grid.spacing[1:]), path, moving=True)


def read_channel(path: Path, index: int) -> Raster:
    """Read channel `index` of a 4-D file whose fourth axis is channels (as BRATS of the Medical Decathlon)."""
    grid = _read_4d_grid(path, index, 0)
    return Raster(np.ascontiguousarray(grid.array[index]), grid.spacing, path, grid.affine)


def _read_4d_grid(path: Path, index: int, axis: int) -> Grid:
    grid = read_grid(path)
    if not grid.is_4d:
        raise CaseError(f"{path}: a 4-D image is expected, found shape {grid.array.shape}.")
    if not 0 <= index < grid.array.shape[axis]:
        raise CaseError(f"{path}: no index {index} on axis {axis} of its shape {grid.array.shape}.")
    return grid


def read_grid(path: Path) -> Grid:
    """Read one file, after checking its size. A NIfTI file whose qform and sform codes are zero has no affine.

    Raises:
        CaseError: unreadable, cut short, too large, of more than four dimensions, or its header is not finite.
    """
    nifti = read_nifti_header(path) if _is_nifti(path) else None
    array = read_voxels(path, nifti) if nifti else None  # before SimpleITK, whose errors name no cause
    reader = _open_with_itk(path)
    if array is None:
        array = _read_with_itk(reader, path)
    rank = reader.GetDimension()
    spacing, origin, direction = np.ones(3), np.zeros(3), np.eye(3)
    num_axes = min(3, rank)
    spacing[:num_axes], origin[:num_axes] = reader.GetSpacing()[:num_axes], reader.GetOrigin()[:num_axes]
    direction[:num_axes, :num_axes] = np.reshape(reader.GetDirection(), (rank, rank))[:num_axes, :num_axes]
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise CaseError(f"{path}: spacing {tuple(spacing.tolist())} must be positive; correct the header.")
    if not np.isfinite(origin).all() or abs(np.linalg.det(direction)) < 1e-3:
        raise CaseError(f"{path}: origin or direction {direction.ravel().tolist()} is no grid; correct the header.")
    has_position = rank >= 3 and (nifti is None or nifti.has_position)
    sizes = reader.GetSize()
    is_4d = len(sizes) > 3 and sizes[3] > 1
    step = float(reader.GetSpacing()[3]) * (nifti.seconds if nifti else 1.0) if is_4d else 1.0
    x, y, z = spacing.tolist()
    affine = affine_from_itk(spacing, direction.ravel(), origin) if has_position else None
    return Grid(array, (z, y, x), affine, is_4d, step if math.isfinite(step) and step > 0 else 1.0)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def read_nifti_header(path: Path) -> NiftiHeader:
    """Read and check the header of a NIfTI-1 or NIfTI-2 file.

    Raises:
        CaseError: not NIfTI, damaged, of more than four dimensions, of invalid spacing, or of an unsupported type.
    """
    check_readable(path)
    leading_bytes = _first_bytes(path, max(NIFTI_HEADERS))
    for byte_order in "<>":
        length = int(np.frombuffer(leading_bytes, f"{byte_order}i4", 1)[0]) if len(leading_bytes) >= 4 else 0
        if length not in NIFTI_HEADERS or len(leading_bytes) < length:
            continue
        fields = np.frombuffer(leading_bytes, NIFTI_HEADERS[length].newbyteorder("<" if byte_order == "<" else ">"), 1)[
            0
        ]
        dims, datatype, offset = fields["dims"].tolist(), int(fields["datatype"]), float(fields["offset"])
        rank, sizes = dims[0], tuple(dims[1 : 1 + max(0, dims[0])])
        if not 1 <= rank <= 7 or any(n < 1 for n in sizes) or not 0 <= offset < 1 << 40:
            raise CaseError(f"{path}: its header is damaged (dimensions {dims}, offset {offset}); copy it again.")
        if any(n != 1 for n in sizes[4:]) or (datatype == RGB24_CODE and any(n != 1 for n in sizes[3:])):
            raise CaseError(f"{path}: {rank}-D image of size {sizes}; split it into 3-D files.")
        steps = fields["steps"][1 : 1 + min(rank, 3)].tolist()
        if fields["sform"] <= 0 and any(not (math.isfinite(step) and step > 0) for step in steps):
            # SimpleITK would replace it by 1 mm, or drop the sign
            raise CaseError(f"{path}: spacing {steps} must be positive; correct the header.")
        if datatype not in NIFTI_DTYPES:
            raise CaseError(f"{path}: NIfTI data type {datatype} is not read; save it as integer or float.")
        return NiftiHeader(
            shape=(*sizes[:3], 1, 1)[:3] + (sizes[3:4] if sizes[3:4] and sizes[3] > 1 else ()),
            dtype=np.dtype(byte_order + NIFTI_DTYPES[datatype]),
            components=3 if datatype == RGB24_CODE else 1,
            offset=int(offset),
            slope=float(fields["slope"]),
            intercept=float(fields["intercept"]),
            seconds=SECONDS_PER_UNIT.get(int(fields["units"]) & 0x38, 1.0),
            has_position=bool(fields["qform"] > 0 or fields["sform"] > 0),
        )
    raise CaseError(f"{path}: no NIfTI header in its {path.stat().st_size} bytes; cut short or of another format.")


def read_voxels(path: Path, header: NiftiHeader) -> np.ndarray:
    """Read voxels [Z, Y, X] ([Z, Y, X, 3] of RGB, [N, Z, Y, X] of a 4-D file) of a NIfTI file, with its scaling.

    Raises:
        CaseError: cut short, damaged, or too large.
    """
    check_size(path, header.size)
    end = header.offset + header.size
    content = (_gunzip_whole(path, end) if path.suffix.lower() == ".gz" else b"") or _first_bytes(path, end)
    if len(content) < end:
        raise CaseError(
            f"{path}: cut short: its header promises {header.size} bytes of voxels {header.shape}, it holds "
            f"{max(0, len(content) - header.offset)}; copy it again."
        )
    shape = header.shape[::-1] if header.components == 1 else (*header.shape[::-1], header.components)
    array = np.frombuffer(content, header.dtype, math.prod(shape), header.offset).reshape(shape)
    return _scaled(array.astype(header.dtype.newbyteorder("="), copy=False), header)


def _scaled(array: np.ndarray, header: NiftiHeader) -> np.ndarray:
    """Apply slope and intercept; integers stay integers if both are whole (such as CT with intercept -1024)."""
    slope, intercept = header.slope, header.intercept
    has_scaling = math.isfinite(slope) and math.isfinite(intercept) and slope != 0
    if not has_scaling or (slope, intercept) == (1, 0) or header.components != 1:
        return array
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 2 and slope.is_integer() and intercept.is_integer():
        bounds = [int(v) * slope + intercept for v in (np.iinfo(array.dtype).min, np.iinfo(array.dtype).max)]
        if max(map(abs, bounds)) < 2**31:
            return array.astype(np.int32) * np.int32(slope) + np.int32(intercept)
    return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _gunzip_whole(path: Path, size: int) -> bytes:
    """Unpack with libdeflate, twice as fast as zlib; empty if the stream is damaged or does not have `size` bytes."""
    import imagecodecs

    try:
        content = bytes(imagecodecs.gzip_decode(path.read_bytes(), out=size))
    except (RuntimeError, ValueError, MemoryError):
        return b""  # `_first_bytes` reads the file again and reports the problem
    return content if len(content) == size else b""


def _first_bytes(path: Path, size: int) -> bytes | bytearray:
    """Read and unpack the first `size` bytes, or fewer if the file is shorter.

    If a gzip stream ends there, its checksum is verified.
    """
    with open(path, "rb") as plain:
        if plain.read(2) != b"\x1f\x8b":
            plain.seek(0)
            return plain.read(size)
    content = bytearray()
    try:
        with gzip.open(path) as file:
            while len(content) < size and (chunk := file.read(min(CHUNK_BYTES, size - len(content)))):
                content += chunk
            file.read(1)  # reading the end of the stream verifies its checksum
    except EOFError:
        if len(content) >= size:
            raise CaseError(f"{path}: cut short: the checksum at its end is missing; copy it again.") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        trailing = len(content) >= size and "Not a gzipped file" in str(error)  # something follows the stream
        if not trailing:
            raise CaseError(f"{path}: damaged after {len(content)} unpacked bytes ({error}); copy it again.") from None
    return content


def _open_with_itk(path: Path) -> sitk.ImageFileReader:
    import SimpleITK as sitk

    check_readable(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    # without it, SimpleITK tries all of its readers, which takes about 5 ms per file
    reader.SetImageIO(next(name for ending, name in ITK_READERS.items() if path.name.lower().endswith(ending)))
    with explain(path, "not readable as an image", "copy or export it again", quote=False):
        reader.ReadImageInformation()
    return reader


def _read_with_itk(reader: sitk.ImageFileReader, path: Path) -> np.ndarray:
    """Read voxels of NRRD and MetaImage, whose SimpleITK readers do report a file that is cut short."""
    import SimpleITK as sitk

    size, dimension = reader.GetSize(), reader.GetDimension()
    if not 2 <= dimension <= 4:
        raise CaseError(f"{path}: {dimension}-D image of size {size}; split it into 3-D files.")
    width = sitk.Image([1] * dimension, reader.GetPixelID()).GetSizeOfPixelComponent()
    check_size(path, math.prod(size) * reader.GetNumberOfComponents() * width)
    fault = f"damaged or cut short: its header declares {size} voxels, but the file has {path.stat().st_size} bytes"
    with explain(path, fault, "copy it again", quote=False):
        image = reader.Execute()
    components = image.GetNumberOfComponentsPerPixel()
    if components not in (1, 3):
        raise CaseError(f"{path}: {components} values per voxel; expected grey or RGB.")
    array = np.asarray(sitk.GetArrayFromImage(image))
    return array[None] if dimension == 2 else array[0] if dimension == 4 and size[3] == 1 else array
