"""A `manifest.csv` or `manifest.jsonl` of one's own, for whatever no other layout knows: one row a case.

    image,mask,patient,modality,split
    s01/t1.nii.gz,tumour=s01/tumour.nii.gz;brain=s01/brain.nii.gz,p1,MR,train
    s02/dicom,s02/seg.dcm,p2,CT,val

Paths are relative to the manifest, or absolute. A manifest beside other data wins over every other layout there.
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
NAMES = ("manifest.csv", "manifest.jsonl")

Line = tuple[int, float, float, float, float, str]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Row(BaseModel):
    """One case.

    Attributes:
        image: a file or a folder. mask: the same; several behind `;` (a list in jsonl), or `name=path` pairs (an
            object in jsonl) where each file is one structure. Not needed where the image holds its masks (npz).
        case, patient, dataset: names; by default the image's, the case's, and that of the manifest's folder.
        modality: one of `MODALITIES`. split: train, val or test; empty leaves it to `prepare`.
        labels: json, {"name": value} or {"name": [value, value]}.
        fps: frames a second of a clip. spacing_mm: of a pixel, where the file does not say.
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
    fps: Rate | None = None
    spacing_mm: Rate | None = None
    recist: tuple[Line, ...] = ()

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
    """A folder with a manifest, or a manifest itself under whatever name."""
    return path.suffix.lower() in (".csv", ".jsonl") if path.is_file() else any((path / n).is_file() for n in NAMES)


def find(path: Path) -> list[CaseRef]:
    """One case a row (a slice of a 4-D file); a row whose files are missing is found too, and fails when read.

    Raises:
        UserError: an unknown column, a value that does not fit, or two manifests in one folder.
    """
    manifests = [path] if path.is_file() else [path / name for name in NAMES if (path / name).is_file()]
    if len(manifests) > 1:
        raise UserError(f"{path}: holds both {' and '.join(NAMES)}; keep one, or give one as SOURCE.")
    manifest = manifests[0]
    rows = [(line, _validated(f"{manifest} line {line}", values)) for line, values in _read(manifest)]
    if not rows:
        raise UserError(f"{manifest}: no row in it; expected one a case below the names of the columns.")
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
        raise UserError(f"{where}: labels and name=path masks both give names; keep one of them.")
    problem = missing_file((image, *masks), f"{where} lists it")
    if not masks:
        problem = f"{where}: {row.image} has no mask; name a file or a folder in the column mask."
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
    """The mask files of a row, and the structure that each is, where the row says so."""
    if isinstance(row.mask, dict):
        return tuple(_path(manifest, text) for text in row.mask.values()), tuple(row.mask)
    if isinstance(row.mask, str):
        whole = row.mask and _path(manifest, row.mask).exists()  # a path may hold ; or =
        texts = [row.mask] if whole else [text.strip() for text in row.mask.split(";") if text.strip()]
    else:
        texts = row.mask
    pairs = [("", t) if "=" not in t or _path(manifest, t).exists() else tuple(t.split("=", 1)) for t in texts]
    names = [name.strip() for name, _ in pairs if name.strip()]
    if names and len(names) != len(pairs):
        raise UserError(f"{where}: mask {row.mask!r}: either every file has a name (liver=a.nii.gz), or none.")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: mask {row.mask!r}: a name stands twice; give each file one of its own.")
    return tuple(_path(manifest, text.strip()) for _, text in pairs), tuple(names)


def _path(manifest: Path, text: str) -> Path:
    return manifest.parent / Path(text).expanduser()


def _known_columns(where: str, columns: Iterable[str]) -> None:
    for column in columns:
        if column not in Row.model_fields:
            hint = did_you_mean(column, Row.model_fields)
            raise UserError(
                f"{where}: no column may be named {column!r}; known are {', '.join(Row.model_fields)}.{hint}"
            )


def _validated(where: str, values: dict[str, Any]) -> Row:
    _known_columns(where, values)
    try:
        return Row.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error)}.") from None


def _read(manifest: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows with their lines in the file; empty cells are left out."""
    with explain(manifest, "not readable as text in UTF-8", "save it again"):
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
            raise UserError(f"{manifest} line {line}: not valid json ({error}); expected one object a line.") from None
        if not isinstance(values, dict):
            raise UserError(f'{manifest} line {line}: found {content[:40]!r}; expected an object {{"image": ...}}.')
        rows.append((line, {key: value for key, value in values.items() if value is not None}))
    return rows


def _cells(manifest: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    head = text.split("\n", 1)[0]
    delimiter = next((d for d in ",;\t" if d in head), ",")  # spreadsheets of some countries write ;
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    columns = [(name or "").strip() for name in reader.fieldnames or []]
    if "image" not in columns:
        hint = did_you_mean("image", columns)
        raise UserError(f"{manifest}: no column image; found {', '.join(columns) or 'nothing'}.{hint}")
    if len(set(columns)) < len(columns):
        raise UserError(f"{manifest}: a column stands twice in {', '.join(columns)}; remove one.")
    reader.fieldnames = columns
    _known_columns(f"{manifest} line 1", columns)
    rows = []
    try:
        for row in reader:
            if row.pop(None, None):  # csv puts what is too much under None
                raise UserError(
                    f"{manifest} line {reader.line_num}: more cells than columns; put cells that hold {delimiter!r} "
                    "in double quotes."
                )
            values = {key: value.strip() for key, value in row.items() if value and value.strip()}
            if values:
                rows.append((reader.line_num, values))
    except csv.Error as error:
        raise UserError(f"{manifest} line {reader.line_num}: not readable as csv ({error}).") from None
    return rows
