"""One sample of a WebDataset tar -> index rows: our own segments by their record, others by the endings of members.

docs/foreign.md has the endings. Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from medsam2.cases.case import MODALITIES, CaseError, Label
from medsam2.cases.formats.limits import MAX_BYTES
from medsam2.cases.listing import label_pairs
from medsam2.cases.settings import DatasetSettings, SettingsBook
from medsam2.cases.values import present_values
from medsam2.errors import UserError, did_you_mean
from medsam2.shards.foreign_frames import Frames, SkippedError, frames_of, image_frame, joined, mask_frame, read
from medsam2.shards.foreign_tar import Member, Sample
from medsam2.shards.identity import slug
from medsam2.shards.record import ENDINGS, ObjectTable, SegmentRecord
from medsam2.shards.segments import object_frames
from medsam2.shards.stage import index_columns

IMAGE = re.compile(r"(?:(?P<frame>\d{1,9})\.|image\.|img\.)?(?P<format>jpg|jpeg|png|npy)")
MASK = re.compile(r"(?:(?P<frame>\d{1,9})\.)?(?:mask|seg|label)\.(?P<format>png|npy)")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLIT_IN_NAME = re.compile(rf"(?:^|[-_.])(?P<split>{'|'.join(SPLITS)})(?=$|[-_.])", re.IGNORECASE)
NUMBER_AT_END = re.compile(r"(?:^|[-_.])\d+$")
JSON_BYTES = 64 << 20  # our own records of long volumes with many objects have a few MB
RECORD_FIELDS = {name for name, field in SegmentRecord.model_fields.items() if field.is_required()}
VOLUMES = ("CT", "MR", "PT")
NO_MASK = "it has no mask"
NO_LABELS = "its masks have no labelled pixel"


class Note(BaseModel):
    """What the json member of a foreign sample may say; all else in it is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)

    dataset: str = ""
    split: str = ""
    case: str = ""
    patient: str = ""
    modality: str = ""
    spacing: tuple[float, ...] = ()
    labels: dict[str, Any] = {}


@dataclass(frozen=True)
class Names:
    """Who a foreign sample is, unsalted: `case` and `patient` are empty where nobody said."""

    dataset: str
    case: str
    patient: str
    split: str


@dataclass(frozen=True)
class Found:
    """One row of the index without the shard; of a foreign sample `names` say what is still to be salted and split."""

    row: dict[str, Any]
    sample: str
    names: Names | None = None


@dataclass(frozen=True)
class Reading:
    """What holds for all samples of a tar: settings, the `--modality` of the command, and what the tar's name says."""

    tar: str
    book: SettingsBook
    modality: str
    dataset: str
    split: str


def names_in(stem: str) -> tuple[str, str]:
    """(data set, split) in a tar's name: `liver-train-000012` is ("liver", "train"); either may be empty."""
    stem = NUMBER_AT_END.sub("", stem)
    match = SPLIT_IN_NAME.search(stem)
    if match is None:
        return stem, ""
    rest = stem[: match.start()] + stem[match.end() :]
    return NUMBER_AT_END.sub("", rest).strip("-_."), SPLITS[match["split"].lower()]


def rows_of(file: IO[bytes], sample: Sample, reading: Reading) -> list[Found]:
    """The rows of a sample: one, or one for each run of frames with a mask.

    Raises:
        SkippedError: it cannot be used. UserError: nobody says its modality.
    """
    if sample.repeated:
        raise SkippedError(f"it has {sample.repeated[0]!r} twice")
    said = _json(file, sample)
    if said.keys() >= RECORD_FIELDS:
        return [_own_row(sample, said)]
    return list(_foreign_rows(file, sample, said, reading))


def _json(file: IO[bytes], sample: Sample) -> dict[str, Any]:
    member = sample.members.get("json")
    if member is None:
        return {}
    if member.length > JSON_BYTES:
        raise SkippedError(f"its json has more than {JSON_BYTES >> 20} MiB")
    try:
        said = json.loads(read(file, member))
    except (ValueError, RecursionError):
        raise SkippedError("its json is not readable") from None
    return said if isinstance(said, dict) else {}


def _own_row(sample: Sample, said: dict[str, Any]) -> Found:
    """The row of a segment that `medsam2 prepare` wrote, equal to that of the lost index."""
    try:
        record = SegmentRecord.model_validate(said)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise SkippedError(f"its record does not fit this version of medsam2 ({key})") from None
    frames, height, width = record.shape
    lists = [record.frames, *(o.pixels for o in record.objects), *(o.boxes for o in record.objects)]
    planes = record.mask_planes * np.dtype("uint16").itemsize
    if any(len(entries) != frames for entries in lists) or min(record.shape) < 1:
        raise SkippedError("its record contradicts itself")
    if frames * height * width * max(record.channels, planes) > MAX_BYTES:
        raise SkippedError(f"its record claims more than the limit of {MAX_BYTES >> 30} GiB")
    places: dict[str, list[int]] = {"frame_offset": [], "frame_length": [], "mask_offset": [], "mask_length": []}
    for number in range(frames):
        for kind, ending in (
            ("frame", f"{number:04d}.{ENDINGS[record.codec]}"),
            ("mask", f"{number:04d}.mask.{ENDINGS[record.mask_codec]}"),
        ):
            member = sample.members.get(ending)
            if member is None:
                raise SkippedError(f"a segment of medsam2 without its {kind} of frame {number}")
            places[f"{kind}_offset"].append(member.offset)
            places[f"{kind}_length"].append(member.length)
    text = sample.members["json"]
    row = {**index_columns(record), "json_offset": text.offset, "json_length": text.length, **places}
    return Found(row, sample.key)


def _foreign_rows(file: IO[bytes], sample: Sample, said: dict[str, Any], reading: Reading) -> Iterator[Found]:
    note = _note(said)
    images, masks = _chosen(sample, IMAGE), _chosen(sample, MASK)
    if not images:
        raise SkippedError("it has no image (jpg, png, npy)")
    if not masks:
        raise SkippedError(NO_MASK)
    split = SPLITS.get(note.split.lower(), note.split) or reading.split
    names = Names(note.dataset or reading.dataset, note.case, note.patient, split)
    modality = _modality(note, reading.book.of(names.dataset).modality, sample, reading)
    settings = reading.book.of(names.dataset, modality)
    numbers, image = _sequence(file, images, "image")
    mask_numbers, mask = _sequence(file, masks, "mask")
    if image.shape[:2] != mask.shape:
        raise SkippedError("its masks have another size than its images")
    if mask_numbers is None and len(mask.places) != len(image.places):
        raise SkippedError("it has another number of masks than of images")
    of_position = _positions(numbers, mask_numbers, len(image.places), len(mask.places))
    found = list(_runs(file, sample, (image, mask), of_position, (note, modality, settings)))
    if not found:
        raise SkippedError(NO_LABELS)
    for row in found:
        yield Found(row | {"dataset": slug(names.dataset)}, sample.key, names)


def _note(said: dict[str, Any]) -> Note:
    """The fields of a json that count.

    Raises:
        SkippedError: one of them has a value that cannot be meant.
    """
    try:
        note = Note.model_validate({key: value for key, value in said.items() if value is not None})
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        raise SkippedError(
            f"its json has a {key!r} of an unforeseen kind; docs/foreign.md says what it may be"
        ) from None
    if note.spacing and (len(note.spacing) not in (2, 3) or not all(0 < s < float("inf") for s in note.spacing)):
        raise SkippedError("its json has a 'spacing' that is not 2 or 3 positive numbers (slice or frame, row, column)")
    if note.split and not note.split.isidentifier():
        raise SkippedError("its json has a 'split' that is no plain word")
    return note


def _modality(note: Note, of_settings: str, sample: Sample, reading: Reading) -> str:
    modality = reading.modality or of_settings or note.modality.upper()
    if not modality:
        raise UserError(
            f"{reading.tar}: sample {sample.key!r}: no json says its modality; give --modality for all "
            f"({', '.join(MODALITIES)})."
        )
    if modality not in MODALITIES:
        hint = did_you_mean(modality, MODALITIES)
        raise SkippedError(f"its json has the modality {modality!r}, not one of {', '.join(MODALITIES)}.{hint}")
    return modality


def _chosen(sample: Sample, pattern: re.Pattern[str]) -> dict[int | None, tuple[str, Member]]:
    """Ending of the format and member by frame number, None for one without; either that one or numbered ones.

    Raises:
        SkippedError: more than one could be meant.
    """
    found: dict[int | None, tuple[str, Member]] = {}
    taken: dict[int | None, str] = {}
    for ending, member in sample.members.items():
        match = pattern.fullmatch(ending)
        if match is None:
            continue
        number = None if match["frame"] is None else int(match["frame"])
        if number in taken:
            raise SkippedError(f"it has {taken[number]!r} and {ending!r}, and only one can be meant")
        taken[number] = ending
        found[number] = (match["format"], member)
    if None in found and len(found) > 1:
        numbered = next(ending for number, ending in taken.items() if number is not None)
        raise SkippedError(f"it has {taken[None]!r} and {numbered!r}, and only one can be meant")
    return found


def _sequence(
    file: IO[bytes], members: dict[int | None, tuple[str, Member]], what: str
) -> tuple[list[int] | None, Frames]:
    """The numbers of the frames in order (None where the members have none), and the frames."""
    is_mask = what == "mask"
    if None in members:
        ending, member = members[None]
        return None, joined([frames_of(file, member, ending, is_mask)], what)
    numbers = sorted(number for number in members if number is not None)
    parts = [frames_of(file, members[n][1], members[n][0], is_mask) for n in numbers]
    if any(len(part.places) != 1 for part in parts):
        raise SkippedError(f"a numbered {what} holds several frames")
    return numbers, joined(parts, what)


def _positions(images: list[int] | None, masks: list[int] | None, frames: int, found: int) -> dict[int, int]:
    """Frame -> place of its mask among the masks, for frames that have one."""
    if masks is None:
        return {n: n for n in range(found)}
    place = {number: n for n, number in enumerate(range(frames) if images is None else images)}
    if any(number not in place for number in masks):
        raise SkippedError("it has a mask of a frame that is not there")
    return {place[number]: n for n, number in enumerate(masks)}


def _runs(
    file: IO[bytes],
    sample: Sample,
    parts: tuple[Frames, Frames],
    of_position: dict[int, int],
    known: tuple[Note, str, DatasetSettings],
) -> Iterator[dict[str, Any]]:
    """One row for each run of neighbouring frames with masks, if an object is on it; every frame is decoded once."""
    (image, mask), (note, modality, settings) = parts, known
    content_hash = _content_hash(file, image)
    spans = [
        [position for _, position in group]
        for _, group in groupby(enumerate(sorted(of_position)), key=lambda pair: pair[1] - pair[0])
    ]
    for span in spans:
        planes = np.stack([mask_frame(file, mask, of_position[position]) for position in span], axis=1)
        objects = _objects(planes, note, settings)
        if not objects:
            continue
        record = SegmentRecord(
            key=sample.key if len(spans) == 1 else f"{sample.key}-{span[0]:05d}",
            dataset="",
            split="",
            case="",
            patient="",
            content_hash=content_hash,
            modality=modality,
            kind="still" if len(image.places) == 1 else "volume" if modality in VOLUMES else "clip",
            frames=tuple(span),
            shape=(len(span), *image.shape[:2]),
            channels=3 if len(image.shape) == 3 else 1,
            mask_planes=1,
            mask_dtype=mask.dtype,
            original_shape=(len(image.places), *image.shape[:2]),
            spacing=_spacing(note),
            affine=None,
            scale=(1.0, 1.0),
            window="as stored",
            codec="png",
            mask_codec="zstd",
            objects=objects,
        )
        # a record is of our own shards, and knows only their codecs
        row = {**index_columns(record), "codec": image.codec, "mask_codec": mask.codec}
        for name, places in (
            ("frame", [image.places[p] for p in span]),
            ("mask", [mask.places[of_position[p]] for p in span]),
        ):
            row[f"{name}_offset"] = [place.offset for place in places]
            row[f"{name}_length"] = [place.length for place in places]
        yield {**row, "json_offset": 0, "json_length": 0}


def _objects(planes: np.ndarray, note: Note, settings: DatasetSettings) -> tuple[ObjectTable, ...]:
    """The objects on planes [1, T, H, W]: pixels and boxes of every frame."""
    try:
        names = {value: name for values, name in label_pairs(note.labels, "json") for value in values}
    except CaseError as error:
        raise SkippedError(f"its {error}") from None
    called = {value: names.get(value, f"object_{value}") for value in present_values(planes[0])}
    labels = tuple(Label(value, settings.labels.rename.get(name, name)) for value, name in called.items())
    return tuple(
        ObjectTable(
            name=found.name,
            value=found.value,
            plane=0,
            pixels=tuple(found.pixels.tolist()),
            boxes=tuple(map(tuple, found.boxes.tolist())),
        )
        for found in object_frames(planes, labels, settings.min_pixels)
    )


def _content_hash(file: IO[bytes], image: Frames) -> str:
    """As `Case.content_hash` of the decoded frames, so that the same pictures prepared from files are found equal."""
    digest = hashlib.sha256(f"{(len(image.places), *image.shape)}|u1".encode())
    for number in range(len(image.places)):
        digest.update(np.ascontiguousarray(image_frame(file, image, number)).data)
    return digest.hexdigest()


def _spacing(note: Note) -> tuple[float, float, float]:
    spacing = (1.0, *note.spacing) if len(note.spacing) == 2 else note.spacing or (1.0, 1.0, 1.0)
    return spacing[0], spacing[1], spacing[2]
