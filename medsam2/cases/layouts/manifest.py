"""A `manifest.csv` or `manifest.jsonl` for data in no other layout, with one row per case.

    image,mask,patient,modality,split
    s01/t1.nii.gz,tumour=s01/tumour.nii.gz;brain=s01/brain.nii.gz,p1,MR,train
    s02/dicom,s02/seg.dcm,p2,CT,val

Paths are relative to the manifest, or absolute. A manifest takes precedence over every other layout in its folder.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from medsam2.cases.case import CaseRef, Part
from medsam2.cases.listing import SPLITS, case_names, label_pairs, missing_file, modality_of
from medsam2.cases.raster import explain
from medsam2.cases.settings import MODALITIES
from medsam2.errors import UserError, did_you_mean, first_problem

NAME = "manifest"
LOOKS_FOR = "manifest.csv or manifest.jsonl with the columns image and mask"
FILE_NAMES = ("manifest.csv", "manifest.jsonl")

RecistLine = tuple[int, float, float, float, float, str]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Row(BaseModel):
    """A row of the manifest, which is one case.

    Attributes:
        image: a file or a folder. mask: a file or a folder; several separated by `;` (a list in jsonl), or `name=path`
            pairs (an object in jsonl), one file per structure. Not needed if the image file holds masks (npz).
        case, patient, dataset: names; the defaults are the names of the image, the case and the manifest's folder.
        modality: one of `MODALITIES`. split: train, val or test; without it, `prepare` assigns one.
        labels: json, {"name": value} or {"name": [value, value]}.
        fps: frames per second of a clip. spacing_mm: pixel size, if the file does not store it.
        recist: json, [[slice, x0, y0, x1, y1, "name"], ...] in pixels of the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    image: str = Field(min_length=1)
    mask: str | list[str] | dict[str, str] = ""
    case: str = ""
    patient: str = ""
    dataset: str = ""
    modality: str = ""
    split: str = ""
    labels: dict[str, Any] = {}
    fps: PositiveNumber | None = None
    spacing_mm: PositiveNumber | None = None
    recist: tuple[RecistLine, ...] = ()

    @field_validator("labels", "recist", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"not valid json ({error})") from None

    @field_validator("modality")
    @classmethod
    def _modality(cls, value: str) -> str:
        upper = value.upper() if value.upper() in MODALITIES else modality_of(value) or value.upper()
        if upper and upper not in MODALITIES:
            raise ValueError(f"not one of {', '.join(MODALITIES)}.{did_you_mean(upper, MODALITIES)}")
        return upper

    @field_validator("split")
    @classmethod
    def _split(cls, value: str) -> str:
        if value and value.lower() not in SPLITS:
            raise ValueError(f"not one of train, val, test.{did_you_mean(value.lower(), SPLITS)}")
        return SPLITS.get(value.lower(), "")


def recognise(path: Path) -> bool:
    """Whether `path` is a folder with a manifest, or a manifest of any name."""
    return (
        path.suffix.lower() in (".csv", ".jsonl") if path.is_file() else any((path / n).is_file() for n in FILE_NAMES)
    )


def find(path: Path) -> list[CaseRef]:
    """List one case per row (or per slice of a 4-D file). A row with missing files is listed, and fails when read.

    Raises:
        UserError: a column is unknown, a value is invalid, or the folder holds two manifests.
    """
    manifests = [path] if path.is_file() else [path / name for name in FILE_NAMES if (path / name).is_file()]
    if len(manifests) > 1:
        raise UserError(f"{path}: holds both {' and '.join(FILE_NAMES)}; remove one, or name one as SOURCE.")
    manifest = manifests[0]
    rows = [(line, _validated(f"{manifest} line {line}", values)) for line, values in _read(manifest)]
    if not rows:
        raise UserError(f"{manifest}: no rows; expected one per case below the names of the columns.")
    names = case_names([_path(manifest, row.image) for _, row in rows])
    return [_ref(manifest, line, row, name) for (line, row), name in zip(rows, names, strict=True)]


def _ref(manifest: Path, line: int, row: Row, name: str) -> CaseRef:
    where = f"{manifest} line {line}"
    image = _path(manifest, row.image)
    masks, names = _masks(manifest, where, row)
    if not masks and image.suffix == ".npz":
        masks = (image,)
    labels = label_pairs(row.labels, where)
    if names and labels:
        raise UserError(f"{where}: labels and name=path masks both give names; remove one of them.")
    problem = missing_file((image, *masks), f"{where} lists it")
    if not masks:
        problem = f"{where}: {row.image} has no mask; put a file or a folder into the column mask."
    return CaseRef(
        row.dataset or manifest.absolute().parent.name,
        row.case or name,
        row.patient,
        images=(image,),
        masks=masks,
        modality=row.modality,
        labels=tuple(((number,), text) for number, text in enumerate(names, start=1)) if names else labels,
        spacing=(1.0 / row.fps if row.fps else 0.0, row.spacing_mm or 0.0),
        part=Part(file_per_structure=bool(names)),
        recist=row.recist,
        split=row.split,
        problem=problem,
    )


def _masks(manifest: Path, where: str, row: Row) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the mask files of a row, and the name of the structure in each, if the row gives names."""
    if isinstance(row.mask, dict):
        return tuple(_path(manifest, text) for text in row.mask.values()), tuple(row.mask)
    if isinstance(row.mask, str):
        is_path = row.mask and _path(manifest, row.mask).exists()  # a path may contain ; or =
        texts = [row.mask] if is_path else [text.strip() for text in row.mask.split(";") if text.strip()]
    else:
        texts = row.mask
    pairs = [("", t) if "=" not in t or _path(manifest, t).exists() else tuple(t.split("=", 1)) for t in texts]
    names = [name.strip() for name, _ in pairs if name.strip()]
    if names and len(names) != len(pairs):
        raise UserError(f"{where}: mask {row.mask!r}: give every file a name (liver=a.nii.gz), or none.")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: mask {row.mask!r}: a name occurs twice; give each file a different name.")
    return tuple(_path(manifest, text.strip()) for _, text in pairs), tuple(names)


def _path(manifest: Path, text: str) -> Path:
    return manifest.parent / Path(text).expanduser()


def _check_columns(where: str, columns: Iterable[str]) -> None:
    for column in columns:
        if column not in Row.model_fields:
            hint = did_you_mean(column, Row.model_fields)
            raise UserError(f"{where}: unknown column {column!r}; columns are {', '.join(Row.model_fields)}.{hint}")


def _validated(where: str, values: dict[str, Any]) -> Row:
    _check_columns(where, values)
    try:
        return Row.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error)}.") from None


def _read(manifest: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read the rows with their line numbers; empty cells are left out."""
    with explain(manifest, "not readable as UTF-8 text", "save it again as UTF-8"):
        text = manifest.read_text(encoding="utf-8-sig")
    return _json_lines(manifest, text) if manifest.suffix.lower() == ".jsonl" else _cells(manifest, text)


def _json_lines(manifest: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            values = json.loads(content)
        except ValueError as error:
            raise UserError(
                f"{manifest} line {line}: not valid json ({error}); expected one object per line."
            ) from None
        if not isinstance(values, dict):
            raise UserError(
                f'{manifest} line {line}: the line is {content[:40]!r}; expected an object {{"image": ...}}.'
            )
        rows.append((line, {key: value for key, value in values.items() if value is not None}))
    return rows


def _cells(manifest: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    head = text.split("\n", 1)[0]
    delimiter = next((d for d in ",;\t" if d in head), ",")  # spreadsheets write ; in some locales
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    columns = [(name or "").strip() for name in reader.fieldnames or []]
    if "image" not in columns:
        hint = did_you_mean("image", columns)
        raise UserError(
            f"{manifest}: the column image is missing; there are {', '.join(columns) or 'no columns'}.{hint}"
        )
    if len(set(columns)) < len(columns):
        raise UserError(f"{manifest}: a column occurs twice in {', '.join(columns)}; remove one.")
    reader.fieldnames = columns
    _check_columns(f"{manifest} line 1", columns)
    rows = []
    try:
        for row in reader:
            if row.pop(None, None):  # csv stores surplus cells under None
                raise UserError(
                    f"{manifest} line {reader.line_num}: more cells than columns; put cells with {delimiter!r} "
                    "into double quotes."
                )
            values = {key: value.strip() for key, value in row.items() if value and value.strip()}
            if values:
                rows.append((reader.line_num, values))
    except csv.Error as error:
        raise UserError(f"{manifest} line {reader.line_num}: not readable as csv ({error}).") from None
    return rows
