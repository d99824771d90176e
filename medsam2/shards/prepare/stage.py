"""Stage one case: write its members and index rows into the staging folder. Staging runs in parallel and resumes.

A staged case is `NAME.part` (tar members without the end mark) and `NAME.json` (rows, size, sha256), written in this
order. After a kill, a case without both files is staged again. Joining cases in a fixed order gives the same shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from tarfile import TarFile
from typing import Any

import numpy as np

from medsam2.cases.case import Case, CaseError, CaseRef
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.intensity import to_uint8
from medsam2.cases.layouts import load_case
from medsam2.files import file_sha256
from medsam2.shards.prepare.folder import SourceState, source_stamp, source_state
from medsam2.shards.prepare.pseudonyms import HASH_DIGITS, salted_hash, slug
from medsam2.shards.prepare.segments import (
    ObjectFrames,
    histogram,
    object_frames,
    reduce_frames,
    training_spans,
    with_lines,
)
from medsam2.shards.record import EXTENSIONS, Codec, ObjectTable, SegmentRecord, encode_frame, encode_mask
from medsam2.shards.tar import add_member, new_tar


@dataclass(frozen=True)
class Recipe:
    """How segments are cut and encoded, in all datasets (`DatasetSettings` holds what differs between them).

    Attributes:
        codec: of the image frames. max_side: longer sides of frames are reduced to this number of pixels.
        segment: maximum number of frames of a training segment.
        margin: number of unlabelled frames around labelled ones in training.
    """

    codec: Codec = "zstd"
    max_side: int = 1024
    segment: int = 64
    margin: int = 8


@dataclass(frozen=True)
class Job:
    """One case to stage: its reference, its split, and the salted ids of case and patient."""

    ref: CaseRef
    split: str
    case: str
    patient: str

    @property
    def name(self) -> str:
        """Original names of dataset and case, for messages on this machine."""
        return f"{self.ref.dataset}/{self.ref.case_id}"

    @property
    def where(self) -> str:
        """The case's first file, for messages on this machine."""
        return str(self.ref.files[0]) if self.ref.files else self.name


@dataclass(frozen=True)
class StagedCase:
    """The result of a job.

    Attributes:
        source: the state of the case's files when they were read. error: empty on success.
        rows: index rows with offsets in the part file. size: bytes of the part file. notes: warnings of the reader.
    """

    job: Job
    source: SourceState
    rows: tuple[dict[str, Any], ...] = ()
    size: int = 0
    notes: tuple[str, ...] = ()
    error: str = ""


def make_job(ref: CaseRef, split: str, salt: bytes) -> Job:
    """Create the job of a case in `split`."""
    return Job(
        ref,
        split,
        salted_hash(salt, "case", ref.dataset, ref.case_id),
        salted_hash(salt, "patient", ref.dataset, ref.patient_id),
    )


def windowed_case_id(case: str, number: int) -> str:
    """The salted id of a case under window `number`: for readers of the shards, each window is a separate case."""
    return case if number == 0 else hashlib.sha256(f"{case}:{number}".encode()).hexdigest()[:HASH_DIGITS]


def part_path(folder: Path, job: Job) -> Path:
    return folder / f"{slug(job.ref.dataset)}-{job.split}-{job.case}.part"


def run_job(job: Job, recipe: Recipe, folder: Path) -> StagedCase:
    """Stage one case unless it is staged already; an error in reading it becomes part of the result."""
    part = part_path(folder, job)
    stamp = staging_stamp(job)
    staged = read_staged(part, job, stamp)
    if staged is not None:
        return staged
    source = source_state(job)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CaseWarning)
            rows, size, digest = stage_case(load_case(job.ref), job, recipe, part)
    except CaseError as error:
        return StagedCase(job, source, error=str(error))
    except OSError:
        raise  # errors in reading are CaseErrors, so this is the staging folder, e.g. a full disk
    except Exception as error:  # one unusual file must not end a run of thousands
        # Only the type of the error is reported: its message may quote a patient's name from the file.
        return StagedCase(job, source, error=f"{job.where}: {type(error).__name__} (unexpected; please report it)")
    notes = tuple(str(w.message) for w in caught if issubclass(w.category, CaseWarning))
    meta = {
        "stamp": stamp, "source": asdict(source), "size": size, "sha256": digest, "notes": notes,
        "rows": rows,
    }  # fmt: skip
    temporary = part.with_suffix(f".json.{secrets.token_hex(4)}.partial")  # another worker may write this case, too
    temporary.write_text(json.dumps(meta))
    os.replace(temporary, part.with_suffix(".json"))
    return StagedCase(job, source, tuple(rows), size, notes)


def read_staged(part: Path, job: Job, stamp: str) -> StagedCase | None:
    """Read a case that an earlier run staged; None if its bytes are incomplete or its sources have changed."""
    try:
        meta = json.loads(part.with_suffix(".json").read_text())
        complete = part.stat().st_size == meta["size"] and file_sha256(part) == meta["sha256"]
        if meta["stamp"] != stamp or not complete:
            return None
        source = SourceState(**meta["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return StagedCase(job, source, tuple(meta["rows"]), meta["size"], tuple(meta["notes"]))


def staging_stamp(job: Job) -> str:
    """Hash the state of a case's sources and the settings that apply to it."""
    settings = job.ref.settings.model_dump_json(exclude={"source", "licence", "patient"})
    return hashlib.sha256(f"{source_stamp(job)} {settings}".encode()).hexdigest()


def stage_case(case: Case, job: Job, recipe: Recipe, part: Path) -> tuple[list[dict[str, Any]], int, str]:
    """Write the members of every segment of `case` to `part`; returns index rows, size in bytes and sha256.

    Raises:
        CaseError: there is no labelled object, or the intensities cannot be scaled.
    """
    settings, content_hash = job.ref.settings, case.content_hash
    temporary = part.with_suffix(f".part.{secrets.token_hex(4)}.partial")
    rows: list[dict[str, Any]] = []
    try:
        with open(temporary, "w+b") as file:
            tar = new_tar(file)
            for number, window in enumerate(settings.clip_windows):
                image, text = to_uint8(case, window, settings.percentiles)
                name = windowed_case_id(job.case, number)
                for record, frames, planes in cut_segments(case, image, text, name, job, recipe, content_hash):
                    rows.append(write_segment(tar, record, frames, planes))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(temporary, part)
    finally:
        temporary.unlink(missing_ok=True)
    return rows, tar.offset, digest


def cut_segments(
    case: Case, image: np.ndarray, window: str, name: str, job: Job, recipe: Recipe, content_hash: str
) -> Iterator[tuple[SegmentRecord, np.ndarray, np.ndarray]]:
    """Cut a case under one window; yields record, frames uint8 [t, h, w(, 3)] and planes [P, t, h, w]."""
    planes = case.planes
    if planes.dtype != np.uint8:
        planes = planes.astype(np.uint8 if planes.max(initial=0) < 256 else np.uint16)
    frames, planes = reduce_frames(image, planes, recipe.max_side)
    scale = (frames.shape[1] / case.image.shape[1], frames.shape[2] / case.image.shape[2])
    min_pixels = job.ref.settings.min_pixels
    objects = with_lines(object_frames(planes, case.labels, min_pixels), case.lines, planes, scale)
    if not objects:
        raise CaseError(
            f"{case.where}: no labelled structure of at least {min_pixels} pixels on a slice; the mask is empty, "
            "or --min-pixels is too high."
        )
    labelled = np.any([o.pixels > 0 for o in objects], axis=0)
    whole = [(0, frames.shape[0])]
    for first, stop in training_spans(labelled, recipe.segment, recipe.margin) if job.split == "train" else whole:
        record = SegmentRecord(
            key=f"{slug(case.dataset)}-{name}-{first:05d}",
            dataset=slug(case.dataset),
            split=job.split,
            case=name,
            patient=job.patient,
            content_hash=content_hash,
            modality=case.modality,
            kind=case.kind,
            frames=tuple(range(first, stop)),
            shape=(stop - first, frames.shape[1], frames.shape[2]),
            channels=3 if frames.ndim == 4 else 1,
            mask_planes=planes.shape[0],
            mask_dtype=planes.dtype.name,
            original_shape=(case.image.shape[0], case.image.shape[1], case.image.shape[2]),
            spacing=case.spacing,
            affine=None if case.affine is None else tuple(tuple(map(float, row)) for row in case.affine),
            scale=scale,
            window=window,
            codec=recipe.codec,
            mask_codec="lz4" if recipe.codec == "lz4" else "zstd",
            objects=tuple(table for o in objects if (table := _object_table(o, first, stop))),
            axes=case.orientation.axes,
            flips=case.orientation.flips,
            histogram=histogram(frames[first:stop]),
        )
        yield record, frames[first:stop], planes[:, first:stop]


def write_segment(tar: TarFile, record: SegmentRecord, frames: np.ndarray, planes: np.ndarray) -> dict[str, Any]:
    """Append the members of a segment (json, then image and mask of each frame); returns its index row."""
    text = record.model_dump_json().encode()
    row = index_columns(record)
    row["json_offset"] = add_member(tar, f"{record.key}.json", text)
    row["json_length"] = len(text)
    lists: dict[str, list[int]] = {"frame_offset": [], "frame_length": [], "mask_offset": [], "mask_length": []}
    image_extension, mask_extension = EXTENSIONS[record.codec], EXTENSIONS[record.mask_codec]
    for number in range(record.shape[0]):
        for kind, payload, name in (
            ("frame", encode_frame(frames[number], record.codec), f"{number:04d}.{image_extension}"),
            ("mask", encode_mask(planes[:, number], record.mask_codec), f"{number:04d}.mask.{mask_extension}"),
        ):
            lists[f"{kind}_offset"].append(add_member(tar, f"{record.key}.{name}", payload))
            lists[f"{kind}_length"].append(len(payload))
    return {**row, **lists}


def index_columns(record: SegmentRecord) -> dict[str, Any]:
    """The columns of an index row that come from the record (all but shard and offsets)."""
    row = record.model_dump(exclude={"shape", "affine", "axes", "flips", "histogram"})
    row["height"], row["width"] = record.shape[1:]
    for table in row["objects"]:
        for name in ("boxes", "lines"):
            table[name] = [*chain.from_iterable(table[name])]
    return row


def _object_table(frames: ObjectFrames, first: int, stop: int) -> ObjectTable | None:
    pixels = frames.pixels[first:stop]
    if not pixels.any():
        return None
    return ObjectTable(
        name=frames.name,
        value=frames.value,
        plane=frames.plane,
        pixels=tuple(pixels.tolist()),
        boxes=tuple(map(tuple, frames.boxes[first:stop].tolist())),
        lines=tuple((line[0] - first, *line[1:]) for line in frames.lines if first <= line[0] < stop),
    )
