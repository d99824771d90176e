"""NIfTI, NRRD, MHA and MHD: 3-D scans, and 4-D ones as clips in time or as channels.

SimpleITK reads a NIfTI file that is cut short without a word and fills the rest with zeros, so the bytes of NIfTI files
are unpacked and counted here; SimpleITK still says where the voxels lie (qform, sform).
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
READERS = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
FIELDS = ["dims", "datatype", "steps", "offset", "slope", "intercept", "units", "qform", "sform"]
TYPES_1, OFFSETS_1 = (
    ["8i2", "i2", "8f4", "f4", "f4", "f4", "u1", "i2", "i2"],
    [40, 70, 76, 108, 112, 116, 123, 252, 254],
)
TYPES_2, OFFSETS_2 = (
    ["8i8", "i2", "8f8", "i8", "f8", "f8", "i4", "i4", "i4"],
    [16, 12, 104, 168, 176, 184, 500, 344, 348],
)
NIFTI_HEADERS = {
    348: np.dtype({"names": FIELDS, "formats": TYPES_1, "offsets": OFFSETS_1, "itemsize": 348}),
    540: np.dtype({"names": FIELDS, "formats": TYPES_2, "offsets": OFFSETS_2, "itemsize": 540}),
}
"""What is needed of the headers of NIfTI-1 and NIfTI-2, by their size in bytes."""
DATATYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8", 128: "u1",
}  # fmt: skip
RGB24 = 128
SECONDS = {16: 1e-3, 24: 1e-6}
"""Of a unit of time in `xyzt_units`; anything else are seconds."""
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Grid:
    """An array as the file has it, and where it lies.

    `array`: [Z, Y, X], [Z, Y, X, 3], or [N, Z, Y, X] of a 4-D file (`fourth`). `spacing`: (z, y, x) mm. `step`: of the
    fourth axis in seconds, 1.0 where unknown. `affine`: RAS+ or None where the file does not say.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray | None
    fourth: bool
    step: float


@dataclass(frozen=True)
class NiftiHeader:
    """Where the voxels of a NIfTI file are and what they mean.

    Attributes:
        shape: (x, y, z), or (x, y, z, n) of a 4-D file. dtype: little- or big-endian. components: 3 of RGB, else 1.
        offset: bytes before the first voxel. slope, intercept: scaling of the stored values.
        seconds: of a unit of the fourth spacing. located: whether qform or sform say where the voxels lie.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    components: int
    offset: int
    slope: float
    intercept: float
    seconds: float
    located: bool

    @property
    def size(self) -> int:
        """Bytes of all voxels."""
        return math.prod(self.shape) * self.components * self.dtype.itemsize


def recognises(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(tuple(READERS))


def read(path: Path, settings: DatasetSettings) -> Raster:
    """A 3-D scan.

    Raises:
        CaseError: unreadable or cut short, too large, 4-D, or an impossible spacing.
    """
    grid = read_grid(path)
    if grid.fourth:
        raise CaseError(
            f"{path}: 4-D image of shape {grid.array.shape}, where one volume is expected; as a series in time give "
            "it a 4-D mask, else split it into 3-D files."
        )
    return Raster(grid.array, grid.spacing, path, grid.affine)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """A 3-D label map as one plane; fractions stay for `threshold` to decide."""
    grid = read_grid(path)
    if grid.fourth or grid.array.ndim != 3:
        raise CaseError(f"{path}: a mask must be 3-D with one value a voxel, found shape {grid.array.shape}.")
    return MaskRaster(as_labels(grid.array, path)[None], path, grid.affine)


def time_slices(path: Path) -> int:
    """How many slices a 4-D file has, each a clip in time; 0 for anything else. Reads the header alone."""
    if not recognises(path):
        return 0
    size = read_nifti_header(path).shape if _is_nifti(path) else _header(path).GetSize()
    return int(size[2]) if len(size) > 3 and size[3] > 1 else 0


def read_time_slice(path: Path, z: int) -> Raster:
    """Slice `z` of a 4-D file over time, [T, Y, X]; its spacing starts with seconds."""
    grid = _fourth(path, z, 1)
    return Raster(np.ascontiguousarray(grid.array[:, z]), (grid.step, *grid.spacing[1:]), path, moving=True)


def read_channel(path: Path, index: int) -> Raster:
    """Channel `index` of a 4-D file whose fourth axis are channels (BRATS of the Decathlon)."""
    grid = _fourth(path, index, 0)
    return Raster(np.ascontiguousarray(grid.array[index]), grid.spacing, path, grid.affine)


def _fourth(path: Path, index: int, axis: int) -> Grid:
    grid = read_grid(path)
    if not grid.fourth:
        raise CaseError(f"{path}: a 4-D image is expected, found shape {grid.array.shape}.")
    if not 0 <= index < grid.array.shape[axis]:
        raise CaseError(f"{path}: no index {index} on axis {axis} of its shape {grid.array.shape}.")
    return grid


def read_grid(path: Path) -> Grid:
    """One file, checked for its size before anything is unpacked.

    A NIfTI with both codes zero says nothing of where it lies.

    Raises:
        CaseError: unreadable, cut short, too large, not finite in its header, or of more than four dimensions.
    """
    nifti = read_nifti_header(path) if _is_nifti(path) else None
    array = read_voxels(path, nifti) if nifti else None
    reader = _header(path)
    if array is None:
        array = _execute(reader, path)
    rank = reader.GetDimension()
    spacing, origin, direction = np.ones(3), np.zeros(3), np.eye(3)
    low = min(3, rank)
    spacing[:low], origin[:low] = reader.GetSpacing()[:low], reader.GetOrigin()[:low]
    direction[:low, :low] = np.reshape(reader.GetDirection(), (rank, rank))[:low, :low]
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise CaseError(f"{path}: spacing {tuple(spacing.tolist())} must be positive; mend the header.")
    if not np.isfinite(origin).all() or abs(np.linalg.det(direction)) < 1e-3:
        raise CaseError(f"{path}: its origin or direction {direction.ravel().tolist()} is no grid; mend the header.")
    located = rank >= 3 and (nifti is None or nifti.located)
    sizes = reader.GetSize()
    fourth = len(sizes) > 3 and sizes[3] > 1
    step = float(reader.GetSpacing()[3]) * (nifti.seconds if nifti else 1.0) if fourth else 1.0
    x, y, z = spacing.tolist()
    affine = affine_from_itk(spacing, direction.ravel(), origin) if located else None
    return Grid(array, (z, y, x), affine, fourth, step if math.isfinite(step) and step > 0 else 1.0)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def read_nifti_header(path: Path) -> NiftiHeader:
    """The header of a NIfTI-1 or NIfTI-2 file, checked.

    Raises:
        CaseError: not NIfTI, damaged, more than four dimensions, an impossible spacing, or of a complex type.
    """
    check_readable(path)
    start = _first_bytes(path, max(NIFTI_HEADERS))
    for order in "<>":
        length = int(np.frombuffer(start, f"{order}i4", 1)[0]) if len(start) >= 4 else 0
        if length not in NIFTI_HEADERS or len(start) < length:
            continue
        stored = np.frombuffer(start, NIFTI_HEADERS[length].newbyteorder("<" if order == "<" else ">"), 1)[0]
        dims, datatype, offset = stored["dims"].tolist(), int(stored["datatype"]), float(stored["offset"])
        rank, sizes = dims[0], tuple(dims[1 : 1 + max(0, dims[0])])
        if not 1 <= rank <= 7 or any(n < 1 for n in sizes) or not 0 <= offset < 1 << 40:
            raise CaseError(f"{path}: its header is damaged (dimensions {dims}, offset {offset}); copy it again.")
        if any(n != 1 for n in sizes[4:]) or (datatype == RGB24 and any(n != 1 for n in sizes[3:])):
            raise CaseError(f"{path}: {rank}-D image of size {sizes}; split it into 3-D files.")
        steps = stored["steps"][1 : 1 + min(rank, 3)].tolist()
        if stored["sform"] <= 0 and any(not (math.isfinite(step) and step > 0) for step in steps):
            # SimpleITK would take 1 mm in its place, or drop the sign
            raise CaseError(f"{path}: spacing {steps} must be positive; mend the header.")
        if datatype not in DATATYPES:
            raise CaseError(f"{path}: NIfTI data type {datatype} is not read; save it as integer or float.")
        return NiftiHeader(
            shape=(*sizes[:3], 1, 1)[:3] + (sizes[3:4] if sizes[3:4] and sizes[3] > 1 else ()),
            dtype=np.dtype(order + DATATYPES[datatype]),
            components=3 if datatype == RGB24 else 1,
            offset=int(offset),
            slope=float(stored["slope"]),
            intercept=float(stored["intercept"]),
            seconds=SECONDS.get(int(stored["units"]) & 0x38, 1.0),
            located=bool(stored["qform"] > 0 or stored["sform"] > 0),
        )
    raise CaseError(f"{path}: no NIfTI header in its {path.stat().st_size} bytes; it is cut short or something else.")


def read_voxels(path: Path, header: NiftiHeader) -> np.ndarray:
    """Voxels [z, y, x] (or [z, y, x, 3], or [n, z, y, x] of a 4-D file) of a `.nii` or `.nii.gz`, scaled as it says.

    Raises:
        CaseError: cut short, damaged, or too large.
    """
    check_size(path, header.size)
    promised = header.offset + header.size
    content = (_gunzip_whole(path, promised) if path.suffix.lower() == ".gz" else b"") or _first_bytes(path, promised)
    if len(content) < promised:
        raise CaseError(
            f"{path}: cut short: its header promises {header.size} bytes of voxels {header.shape}, it holds "
            f"{max(0, len(content) - header.offset)}; copy it again."
        )
    shape = header.shape[::-1] if header.components == 1 else (*header.shape[::-1], header.components)
    array = np.frombuffer(content, header.dtype, math.prod(shape), header.offset).reshape(shape)
    return _scaled(array.astype(header.dtype.newbyteorder("="), copy=False), header)


def _scaled(array: np.ndarray, header: NiftiHeader) -> np.ndarray:
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


def _gunzip_whole(path: Path, size: int) -> bytes:
    """The whole stream through libdeflate, twice as fast as zlib; empty unless it is sound and has `size` bytes."""
    import imagecodecs

    try:
        content = bytes(imagecodecs.gzip_decode(path.read_bytes(), out=size))
    except (RuntimeError, ValueError, MemoryError):
        return b""  # cut short, damaged, longer or in several members: `_first_bytes` finds out which
    return content if len(content) == size else b""


def _first_bytes(path: Path, size: int) -> bytes | bytearray:
    """The first `size` bytes, unpacked, fewer where the file ends; nothing beyond them is kept.

    Where a gzip stream ends with them, its checksum is verified.
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
            file.read(1)  # the checksum is read with the end of the stream
    except EOFError:
        if len(content) >= size:
            raise CaseError(f"{path}: cut short: the checksum at its end is missing; copy it again.") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        trailing = len(content) >= size and "Not a gzipped file" in str(error)  # something follows the stream
        if not trailing:
            raise CaseError(f"{path}: damaged after {len(content)} unpacked bytes ({error}); copy it again.") from None
    return content


def _header(path: Path) -> sitk.ImageFileReader:
    import SimpleITK as sitk

    check_readable(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    # else every reader of the library is asked, for some 5 ms a file
    reader.SetImageIO(next(name for ending, name in READERS.items() if path.name.lower().endswith(ending)))
    with explain(path, "not readable as an image", "copy or export it again", quote=False):
        reader.ReadImageInformation()
    return reader


def _execute(reader: sitk.ImageFileReader, path: Path) -> np.ndarray:
    """What SimpleITK reads itself (NRRD, MetaImage): these readers notice a file that is cut short."""
    import SimpleITK as sitk

    size, dimension = reader.GetSize(), reader.GetDimension()
    if not 2 <= dimension <= 4:
        raise CaseError(f"{path}: {dimension}-D image of size {size}; split it into 3-D files.")
    width = sitk.Image([1] * dimension, reader.GetPixelID()).GetSizeOfPixelComponent()
    check_size(path, math.prod(size) * reader.GetNumberOfComponents() * width)
    promised = f"its header promises {size} voxels, which its {path.stat().st_size} bytes do not give"
    with explain(path, f"damaged or cut short: {promised}", "copy it again", quote=False):
        image = reader.Execute()
    components = image.GetNumberOfComponentsPerPixel()
    if components not in (1, 3):
        raise CaseError(f"{path}: {components} values a voxel; expected grey or RGB.")
    array = np.asarray(sitk.GetArrayFromImage(image))
    return array[None] if dimension == 2 else array[0] if dimension == 4 and size[3] == 1 else array
