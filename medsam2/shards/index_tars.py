"""The index of tars that have none: our own shards whose index was lost, and tars of other tools.

The latter follow the convention of docs/how-to/index-tars.md.

No tar is changed and no member is unpacked to a file: members are read by the byte ranges that `tarfile` states. A tar
that does not follow the convention is refused by the name of the member at fault, and then no index is written.

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
from medsam2.shards.index import ARROW, JSON, write_index
from medsam2.shards.prepare.pseudonyms import read_salt, salted, slug
from medsam2.shards.prepare.publish import Progress, Row
from medsam2.shards.prepare.segments import object_frames
from medsam2.shards.prepare.stage import index_columns
from medsam2.shards.summary import summarise
from medsam2.shards.target import is_local, open_url

MEMBER = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<ending>[^/]+)")
"""WebDataset splits a member's name at the first dot of its base name."""
PICTURE = re.compile(r"(?:\d{4,}\.)?(?:mask\.)?(?:png|jpg)")
CODECS: dict[str, record.Codec] = {"png": "png", "jpg": "jpeg"}
SAMPLES_PER_PIXEL: dict[str, tuple[int, ...]] = {"1": (), "L": (), "P": (3,), "RGB": (3,)}
"""Pillow's mode of a picture of 8 bits -> the last axis of the decoded frame; a palette becomes colours."""
VOLUMES = ("CT", "MR", "PT")
MAX_JSON_BYTES = 64 << 20  # records of long volumes with many objects have a few MB


class SampleNote(BaseModel):
    """The json member of a sample, as docs/how-to/index-tars.md describes it.

    Attributes:
        patient: stands in the index as a salted hash only. labels: value in the masks -> name of the structure.
        spacing: slice (mm) or frame (seconds), row, column (mm).
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
    """Neighbouring members of one key by their endings. `where` is the start of their names in messages."""

    file: IO[bytes]
    where: str
    key: str
    members: dict[str, tarfile.TarInfo]

    def read(self, ending: str) -> bytes:
        """The payload of a member.

        Raises:
            UserError: there is no such member.
        """
        info = self.place(ending)
        self.file.seek(info.offset_data)
        return self.file.read(info.size)

    def place(self, ending: str) -> tarfile.TarInfo:
        """Where a member is, as `read`."""
        if ending not in self.members:
            raise UserError(f"{self.where}.{ending}: is not there; see docs/how-to/index-tars.md.")
        return self.members[ending]


def index_tars(
    source: str, workers: int, force: bool = False, dry_run: bool = False, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Write `index.arrow` and `index.json` beside the tars in `source`, a folder or an fsspec URL.

    Args:
        workers: how many tars are read at once. force: replace an index. progress: of tars, as of shards.

    Returns:
        The content of `index.json`; its `failed_cases` counts samples without a labelled structure, which are left out.

    Raises:
        UserError: there is no tar, there is an index (without `force`), or a tar does not follow the convention.
    """
    filesystem, root = open_url(source)
    names = sorted(path.rsplit("/", 1)[-1] for path in filesystem.ls(root, False)) if filesystem.isdir(root) else []
    if {ARROW, JSON} & set(names) and not (force or dry_run):
        raise UserError(f"{source}: an index exists already; give --force to replace it.")
    before: dict[str, Any] = {}
    with suppress(ValueError, TypeError):  # a damaged index.json is made again without what it said
        before = dict(json.loads(filesystem.cat_file(f"{root}/{JSON}"))) if JSON in names else {}
    tars = [name for name in names if name.endswith(".tar") and name[0] != "."]
    if not tars:
        raise UserError(f"{source}: holds no .tar file; give the folder of the tars, compressed ones unpacked to .tar.")
    rows: list[Row] = []
    shards: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(workers) as pool:
        scans = pool.map(lambda name: scan_tar(filesystem, f"{root}/{name}"), tars)
        for done, (of_tar, entry) in enumerate(scans, 1):
            shards[tars[done - 1]] = entry
            rows += of_tar
            progress(done, len(tars))
    labelled = [row for row in rows if row["objects"]]
    _check_names(labelled)
    if not labelled:
        raise UserError(
            f"{source}: no sample of {len(tars)} tars has a labelled structure; see docs/how-to/index-tars.md."
        )
    made_by = {"index_only": True, "version": __version__}
    summary = summarise(labelled, shards, made_by, len(rows) - len(labelled), before.get("datasets"))
    summary |= {key: value for key, value in before.items() if key not in summary or key == "configuration"}
    if not dry_run:
        _write(filesystem, root, labelled, summary)
    return summary


def scan_tar(filesystem: Any, path: str) -> tuple[list[Row], dict[str, Any]]:
    """The index rows of one tar, and its entry in `index.json` (bytes, sha256).

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
    """The samples of a tar of `size` bytes; what is no plain file or has no ending is passed over.

    Raises:
        UserError: the tar is cut short, damaged or compressed, or a member is there twice.
    """
    samples: dict[str, Sample] = {}
    at = 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # compressed tars cannot be read by offset
            for info in tar:
                at = info.offset
                if not 0 <= info.size <= size - info.offset_data:
                    raise tarfile.ReadError(f"{info.name} claims {info.size} bytes")
                match = MEMBER.fullmatch(info.name)
                if match is None or not info.isreg() or info.issparse():
                    continue
                key, ending = match.groups()
                sample = samples.setdefault(key, Sample(file, f"{path}: {key}", key, {}))
                if sample.members.setdefault(ending, info) is not info:
                    raise UserError(f"{path}: {info.name}: is there twice; give every sample a key of its own.")
            at = tar.offset
        file.seek(at)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError("neither a member nor an end mark")
    except (tarfile.TarError, ArithmeticError) as error:
        raise UserError(
            f"{path}: is no whole, uncompressed tar from byte {at} on ({error}); copy it again, or move it elsewhere."
        ) from None
    return [sample for key, sample in samples.items() if not key.rsplit("/", 1)[-1].startswith("__")]


def _row(sample: Sample) -> Row:
    """The index row of a sample without its shard: of our own segments what the record says."""
    if "json" in sample.members and sample.members["json"].size > MAX_JSON_BYTES:
        raise UserError(f"{sample.where}.json: has more than the limit of {MAX_JSON_BYTES >> 20} MiB.")
    try:
        content = json.loads(sample.read("json"))
        prepared = isinstance(content, dict) and "content_hash" in content
        if prepared:
            row, endings = _segment_row(sample, record.SegmentRecord.model_validate(content))
        else:
            row, endings = _picture_row(sample, SampleNote.model_validate(content))
    except ValidationError as error:
        raise UserError(f"{sample.where}.json: {first_problem(error)}; see docs/how-to/index-tars.md.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{sample.where}.json: is not readable as json.") from None
    for kind, names in endings.items():
        row[f"{kind}_offset"] = [sample.place(name).offset_data for name in names]
        row[f"{kind}_length"] = [sample.place(name).size for name in names]
    text = sample.place("json")
    return {**row, "json_offset": text.offset_data if prepared else 0, "json_length": text.size if prepared else 0}


def _segment_row(sample: Sample, segment: record.SegmentRecord) -> tuple[Row, dict[str, list[str]]]:
    """What a record of `medsam2 prepare` says, and the endings of its frames and masks."""
    _check_bytes(sample, math.prod(segment.shape) * max(segment.channels, 2 * segment.mask_planes))
    frames = [f"{number:04d}.{record.ENDINGS[segment.codec]}" for number in range(segment.shape[0])]
    masks = [f"{number:04d}.mask.{record.ENDINGS[segment.mask_codec]}" for number in range(segment.shape[0])]
    return index_columns(segment), {"frame": frames, "mask": masks}


def _picture_row(sample: Sample, note: SampleNote) -> tuple[Row, dict[str, list[str]]]:
    """What the pictures of a sample hold, and the endings of its frames and masks; every picture is decoded once."""
    images, masks = _pictures(sample)
    codec = CODECS[images[0].rsplit(".", 1)[-1]]
    shape = _shape(sample, images[0], codec)
    _check_bytes(sample, len(images) * math.prod(shape[:2]) * 3)
    planes = np.empty((1, len(images), *shape[:2]), np.uint16)
    digest = hashlib.sha256(f"{(len(images), *shape)}|u1".encode())  # as `Case.content_hash` of the same pictures
    for number, pair in enumerate(zip(images, masks, strict=True)):
        if _shape(sample, pair[0], codec) != shape:
            raise UserError(f"{sample.where}.{pair[0]}: differs from the shape {shape} of {images[0]}.")
        for ending in pair:
            try:
                if ending == pair[0]:
                    digest.update(record.decode_frame(sample.read(ending), codec, shape).data)
                else:
                    planes[:, number] = record.decode_mask(sample.read(ending), "png", (1, *shape[:2]), "uint16")
            except (record.CorruptFrameError, Image.DecompressionBombError) as error:
                raise UserError(f"{sample.where}.{ending}: {error}.") from None
    present = present_values(planes[0])
    if unknown := [value for value in present if value not in note.labels]:
        raise UserError(f"{sample.where}.json: labels: lacks the value {unknown[0]}, which the masks hold.")
    tables = object_frames(planes, tuple(Label(value, note.labels[value]) for value in present), min_pixels=1)
    row = {
        **note.model_dump(include={"split", "modality", "spacing"}),
        "key": sample.key,
        "dataset": slug(note.dataset),
        "case": salted(read_salt(), "case", note.dataset, sample.key),
        "patient": salted(read_salt(), "patient", note.dataset, note.patient),
        "content_hash": digest.hexdigest(),
        "kind": "still" if len(images) == 1 else "volume" if note.modality in VOLUMES else "clip",
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


def _pictures(sample: Sample) -> tuple[list[str], list[str]]:
    """The endings of the images and of the masks of a sample, in the order of their frames.

    Raises:
        UserError: a picture is missing, or is named otherwise than the convention says.
    """
    pictures = sorted(filter(PICTURE.fullmatch, sample.members), key=lambda ending: (len(ending), ending))
    images = [ending for ending in pictures if "mask." not in ending] or ["jpg"]
    kind = images[0].rsplit(".", 1)[-1]
    if images != [kind]:
        images = [f"{number:04d}.{kind}" for number in range(len(images))]
    masks = [image.removesuffix(kind) + "mask.png" for image in images]
    for ending in pictures:
        if ending not in images + masks:
            expected = f"{sample.key}.{images[0]} with {sample.key}.{masks[0]}"
            raise UserError(f"{sample.where}.{ending}: expected are {expected}, and so on for every frame.")
    return images, masks


def _shape(sample: Sample, ending: str, codec: str) -> tuple[int, ...]:
    """[H, W] or [H, W, 3] of a picture of 8 bits from its header alone: nothing is decoded before it is sound."""
    try:
        with Image.open(io.BytesIO(sample.read(ending)), formats=(codec.upper(),)) as picture:
            return picture.height, picture.width, *SAMPLES_PER_PIXEL[picture.mode]
    except (OSError, ValueError, SyntaxError, KeyError, Image.DecompressionBombError) as error:
        raise UserError(f"{sample.where}.{ending}: is no {codec} of 8 bits, grey or RGB ({error}).") from None


def _check_bytes(sample: Sample, size: int) -> None:
    if size > MAX_UNPACKED_BYTES:
        raise UserError(f"{sample.where}: unpacks to {size} bytes; the limit is {MAX_UNPACKED_BYTES >> 30} GiB.")


def _check_names(rows: Sequence[Row]) -> None:
    """Keys are unique in a data set, and all cases of a patient belong to one split.

    Raises:
        UserError: naming the tars.
    """
    tars: dict[tuple[str, str], str] = {}
    homes: dict[str, Row] = {}
    for row in rows:
        first = tars.setdefault((row["dataset"], row["key"]), row["shard"])
        if first != row["shard"]:
            raise UserError(f"{row['shard']}: {row['key']}: is in {first} too; move one of the tars elsewhere.")
        home = homes.setdefault(row["patient"], row)
        if home["split"] != row["split"]:
            raise UserError(
                f"{row['shard']}: {row['key']}: its patient is in {row['split']}, but in {home['split']} with "
                f"{home['shard']}: {home['key']}; all samples of a patient belong to one split."
            )


def _write(filesystem: Any, root: str, rows: Sequence[Row], summary: dict[str, Any]) -> None:
    """The two files of the index; locally whole or absent, at a URL `index.arrow` last."""
    if is_local(filesystem):
        write_index(Path(root), rows, summary)
        return
    with tempfile.TemporaryDirectory(prefix="medsam2-") as folder:
        write_index(Path(folder), rows, summary)
        for name in (JSON, ARROW):
            filesystem.put_file(f"{folder}/{name}", f"{root}/{name}")
