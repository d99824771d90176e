"""Index tars that have no index: shards of `medsam2 prepare` whose index was lost, and tars of other tools.

The latter follow the convention of docs/how-to/index-tars.md.

Tars are not changed, and no member is extracted to a file: members are read by the byte ranges that `tarfile` gives. If
a tar does not follow the convention, the error names the member, and no index is written.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from medsam2 import __version__
from medsam2.cases.case import Label, Modality
from medsam2.cases.raster import MAX_UNPACKED_BYTES
from medsam2.cases.values import present_values
from medsam2.errors import UserError, first_problem
from medsam2.shards import record
from medsam2.shards.index import INDEX_FILE, SUMMARY_FILE, write_index
from medsam2.shards.prepare.pseudonyms import read_salt, salted_hash, slug
from medsam2.shards.prepare.publish import Progress, Row
from medsam2.shards.prepare.segments import object_frames
from medsam2.shards.prepare.stage import index_columns
from medsam2.shards.summary import summarise
from medsam2.shards.target import is_local, open_url

MEMBER_NAME = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<extension>[^/]+)")
"""WebDataset splits a member's name at the first dot of its base name."""
IMAGE_EXTENSION = re.compile(r"(?:\d{4,}\.)?(?:mask\.)?(?:png|jpg)")
CODECS: dict[str, record.Codec] = {"png": "png", "jpg": "jpeg"}
SAMPLES_PER_PIXEL: dict[str, tuple[int, ...]] = {"1": (), "L": (), "P": (3,), "RGB": (3,)}
"""Pillow's mode of an 8-bit image -> the last axis of the decoded frame; a palette is converted to colours."""
VOLUMES = ("CT", "MR", "PT")
MAX_JSON_BYTES = 64 << 20  # records of long volumes with many objects take a few MB


class SampleMetadata(BaseModel):
    """The json member of a sample, as described in docs/how-to/index-tars.md.

    Attributes:
        patient: name; the index holds its salted hash only. labels: value in the masks -> name of the structure.
        spacing: of slices (mm) or frames (seconds), rows and columns (mm).
    """

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)

    dataset: str = Field(min_length=1)
    split: Literal["train", "val", "test"]
    patient: str = Field(min_length=1)
    modality: Modality
    labels: dict[int, str]
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Sample:
    """The members of one key by their extensions. `where` names the sample in messages."""

    file: IO[bytes]
    where: str
    key: str
    members: dict[str, tarfile.TarInfo]

    def read(self, extension: str) -> bytes:
        """Read the payload of a member.

        Raises:
            UserError: the member is missing.
        """
        info = self.member(extension)
        self.file.seek(info.offset_data)
        return self.file.read(info.size)

    def member(self, extension: str) -> tarfile.TarInfo:
        """Return a member; raises as `read`."""
        if extension not in self.members:
            raise UserError(f"{self.where}.{extension}: is missing; see docs/how-to/index-tars.md.")
        return self.members[extension]


def index_tars(
    source: str, workers: int, force: bool = False, dry_run: bool = False, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Write `index.arrow` and `index.json` beside the tars in `source`, a folder or an fsspec URL.

    Args:
        workers: number of tars read at once. force: replace an index. progress: called with (tars read, total).

    Returns:
        The content of `index.json`; its `failed_cases` counts samples without a labelled structure, which are left out.

    Raises:
        UserError: there is no tar, an index exists (without `force`), or a tar does not follow the convention.
    """
    filesystem, root = open_url(source)
    names = sorted(path.rsplit("/", 1)[-1] for path in filesystem.ls(root, False)) if filesystem.isdir(root) else []
    if {INDEX_FILE, SUMMARY_FILE} & set(names) and not (force or dry_run):
        raise UserError(f"{source}: an index exists; give --force to replace it.")
    old_summary: dict[str, Any] = {}
    with suppress(ValueError, TypeError):  # a damaged index.json is replaced, and its content is lost
        old_summary = dict(json.loads(filesystem.cat_file(f"{root}/{SUMMARY_FILE}"))) if SUMMARY_FILE in names else {}
    tars = [name for name in names if name.endswith(".tar") and name[0] != "."]
    if not tars:
        raise UserError(f"{source}: holds no .tar file; give the folder of the tars, compressed ones unpacked to .tar.")
    rows: list[Row] = []
    shards: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(workers) as pool:
        scans = pool.map(lambda name: scan_tar(filesystem, f"{root}/{name}"), tars)
        for done, (tar_rows, entry) in enumerate(scans, 1):
            shards[tars[done - 1]] = entry
            rows += tar_rows
            progress(done, len(tars))
    labelled = [row for row in rows if row["objects"]]
    _check_keys_and_splits(labelled)
    if not labelled:
        raise UserError(
            f"{source}: no sample of {len(tars)} tars has a labelled structure; see docs/how-to/index-tars.md."
        )
    configuration = {"index_only": True, "version": __version__}
    summary = summarise(labelled, shards, configuration, len(rows) - len(labelled), old_summary.get("datasets"))
    summary |= {key: value for key, value in old_summary.items() if key not in summary or key == "configuration"}
    if not dry_run:
        _write(filesystem, root, labelled, summary)
    return summary


def scan_tar(filesystem: Any, path: str) -> tuple[list[Row], dict[str, Any]]:
    """Read the index rows of one tar, and its entry in `index.json` (bytes, sha256).

    Raises:
        UserError: the tar is damaged, or a member does not follow the convention.
    """
    try:
        with filesystem.open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            rows = [{**_row(sample), "shard": path.rsplit("/", 1)[-1]} for sample in _samples(path, file, size)]
            file.seek(0)
            return rows, {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None


def _samples(path: str, file: IO[bytes], size: int) -> list[Sample]:
    """List the samples of a tar of `size` bytes; members that are no regular files or have no extension are skipped.

    Raises:
        UserError: the tar is truncated, damaged or compressed, or holds a member twice.
    """
    samples: dict[str, Sample] = {}
    offset = 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # compressed tars cannot be read by offset
            for info in tar:
                offset = info.offset
                if not 0 <= info.size <= size - info.offset_data:
                    raise tarfile.ReadError(f"{info.name} states a size of {info.size} bytes")
                match = MEMBER_NAME.fullmatch(info.name)
                if match is None or not info.isreg() or info.issparse():
                    continue
                key, extension = match.groups()
                sample = samples.setdefault(key, Sample(file, f"{path}: {key}", key, {}))
                if sample.members.setdefault(extension, info) is not info:
                    raise UserError(f"{path}: {info.name}: occurs twice; give every sample a unique key.")
            offset = tar.offset
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile reads a damaged header as the end
            raise tarfile.ReadError("neither a member nor an end mark")
    except (tarfile.TarError, ArithmeticError) as error:
        raise UserError(
            f"{path}: is not a complete, uncompressed tar after byte {offset} ({error}); copy it again or move it away."
        ) from None
    return [sample for key, sample in samples.items() if not key.rsplit("/", 1)[-1].startswith("__")]


def _row(sample: Sample) -> Row:
    """The index row of a sample, without its shard."""
    if "json" in sample.members and sample.members["json"].size > MAX_JSON_BYTES:
        raise UserError(f"{sample.where}.json: has more than the limit of {MAX_JSON_BYTES >> 20} MiB.")
    try:
        content = json.loads(sample.read("json"))
        prepared = isinstance(content, dict) and "content_hash" in content
        if prepared:
            row, extensions = _segment_row(sample, record.SegmentRecord.model_validate(content))
        else:
            row, extensions = _image_row(sample, SampleMetadata.model_validate(content))
    except ValidationError as error:
        raise UserError(f"{sample.where}.json: {first_problem(error)}; see docs/how-to/index-tars.md.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{sample.where}.json: is not valid json.") from None
    for kind, names in extensions.items():
        row[f"{kind}_offset"] = [sample.member(name).offset_data for name in names]
        row[f"{kind}_length"] = [sample.member(name).size for name in names]
    info = sample.member("json")
    return {**row, "json_offset": info.offset_data if prepared else 0, "json_length": info.size if prepared else 0}


def _segment_row(sample: Sample, segment: record.SegmentRecord) -> tuple[Row, dict[str, list[str]]]:
    """Index columns of a segment of `medsam2 prepare`, and the extensions of its frames and masks."""
    _check_bytes(sample, math.prod(segment.shape) * max(segment.channels, 2 * segment.mask_planes))
    frames = [f"{number:04d}.{record.EXTENSIONS[segment.codec]}" for number in range(segment.shape[0])]
    masks = [f"{number:04d}.mask.{record.EXTENSIONS[segment.mask_codec]}" for number in range(segment.shape[0])]
    return index_columns(segment), {"frame": frames, "mask": masks}


def _image_row(sample: Sample, metadata: SampleMetadata) -> tuple[Row, dict[str, list[str]]]:
    """Index columns of a sample of another tool, and the extensions of its images and masks; decodes each once."""
    images, masks = _image_extensions(sample)
    codec = CODECS[images[0].rsplit(".", 1)[-1]]
    shape = _image_shape(sample, images[0], codec)
    _check_bytes(sample, len(images) * math.prod(shape[:2]) * 3)
    planes = np.empty((1, len(images), *shape[:2]), np.uint16)
    digest = hashlib.sha256(f"{(len(images), *shape)}|u1".encode())  # the `Case.content_hash` of the same images
    for number, pair in enumerate(zip(images, masks, strict=True)):
        if _image_shape(sample, pair[0], codec) != shape:
            raise UserError(f"{sample.where}.{pair[0]}: differs from the shape {shape} of {images[0]}.")
        for extension in pair:
            content = sample.read(extension)
            try:
                if extension == pair[0]:
                    digest.update(record.decode_frame(content, codec, shape).data)
                else:
                    planes[:, number] = record.decode_mask(content, "png", (1, *shape[:2]), "uint16")
            except (record.CorruptFrameError, Image.DecompressionBombError) as error:
                raise UserError(f"{sample.where}.{extension}: {error}.") from None
    present = present_values(planes[0])
    if unknown := [value for value in present if value not in metadata.labels]:
        raise UserError(f"{sample.where}.json: labels: lacks the value {unknown[0]}, which the masks hold.")
    tables = object_frames(planes, tuple(Label(value, metadata.labels[value]) for value in present), min_pixels=1)
    row = {
        **metadata.model_dump(include={"split", "modality", "spacing"}),
        "key": sample.key,
        "dataset": slug(metadata.dataset),
        "case": salted_hash(read_salt(), "case", metadata.dataset, sample.key),
        "patient": salted_hash(read_salt(), "patient", metadata.dataset, metadata.patient),
        "content_hash": digest.hexdigest(),
        "kind": "still" if len(images) == 1 else "volume" if metadata.modality in VOLUMES else "clip",
        "frames": list(range(len(images))),
        "height": shape[0],
        "width": shape[1],
        "channels": 3 if len(shape) == 3 else 1,
        "mask_planes": 1,
        "mask_dtype": "uint8" if max(present, default=0) < 256 else "uint16",
        "original_shape": planes.shape[1:],
        "scale": (1.0, 1.0),
        "window": "as stored",
        "codec": codec,
        "mask_codec": "png",
        "objects": [
            {**vars(table), "pixels": table.pixels.tolist(), "boxes": table.boxes.ravel().tolist()} for table in tables
        ],
    }
    return row, {"frame": images, "mask": masks}


def _image_extensions(sample: Sample) -> tuple[list[str], list[str]]:
    """The extensions of the images and of the masks of a sample, in the order of their frames.

    Raises:
        UserError: a name does not follow the convention.
    """
    extensions = sorted(filter(IMAGE_EXTENSION.fullmatch, sample.members), key=lambda name: (len(name), name))
    images = [extension for extension in extensions if "mask." not in extension] or ["jpg"]
    kind = images[0].rsplit(".", 1)[-1]
    if images != [kind]:
        images = [f"{number:04d}.{kind}" for number in range(len(images))]
    masks = [image.removesuffix(kind) + "mask.png" for image in images]
    for extension in extensions:
        if extension not in images + masks:
            expected = f"{sample.key}.{images[0]} with {sample.key}.{masks[0]}"
            raise UserError(f"{sample.where}.{extension}: expected {expected}, and so on for every frame.")
    return images, masks


def _image_shape(sample: Sample, extension: str, codec: str) -> tuple[int, ...]:
    """Read the shape [H, W] or [H, W, 3] of an 8-bit image from its header, before anything is decoded."""
    try:
        with Image.open(io.BytesIO(sample.read(extension)), formats=(codec.upper(),)) as picture:
            return picture.height, picture.width, *SAMPLES_PER_PIXEL[picture.mode]
    except (OSError, ValueError, SyntaxError, KeyError, Image.DecompressionBombError) as error:
        raise UserError(f"{sample.where}.{extension}: is not an 8-bit {codec}, grey or RGB ({error}).") from None


def _check_bytes(sample: Sample, size: int) -> None:
    if size > MAX_UNPACKED_BYTES:
        raise UserError(f"{sample.where}: decompresses to {size} bytes; the limit is {MAX_UNPACKED_BYTES >> 30} GiB.")


def _check_keys_and_splits(rows: Sequence[Row]) -> None:
    """Check that keys are unique in a dataset, and that all cases of a patient belong to one split.

    Raises:
        UserError: they do not; the message names the tars.
    """
    tars: dict[tuple[str, str], str] = {}
    first_rows: dict[str, Row] = {}
    for row in rows:
        first = tars.setdefault((row["dataset"], row["key"]), row["shard"])
        if first != row["shard"]:
            raise UserError(f"{row['shard']}: {row['key']}: is in {first} too; move one of the tars away.")
        other = first_rows.setdefault(row["patient"], row)
        if other["split"] != row["split"]:
            raise UserError(
                f"{row['shard']}: {row['key']}: its patient is in {row['split']} here, but in {other['split']} in "
                f"{other['shard']}: {other['key']}; all samples of a patient belong to one split."
            )


def _write(filesystem: Any, root: str, rows: Sequence[Row], summary: dict[str, Any]) -> None:
    """Write both files of the index: atomically in a local folder, `index.arrow` last at a URL."""
    if is_local(filesystem):
        write_index(Path(root), rows, summary)
        return
    with tempfile.TemporaryDirectory(prefix="medsam2-") as folder:
        write_index(Path(folder), rows, summary)
        for name in (SUMMARY_FILE, INDEX_FILE):
            filesystem.put_file(f"{folder}/{name}", f"{root}/{name}")
