"""`meta.json` beside clips: modality, label names, frame rate, pixel size and, optionally, patients and origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from medsam2.cases.case import CaseError, Origin
from medsam2.cases.layouts.registry import CaseRef

VOID = 255
"""DAVIS marks pixels that are not to be scored with 255; they count as background."""


class ClipMeta(BaseModel):
    """What `meta.json` may say; every field is optional. `patients` maps a clip's name to its patient."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    modality: str = ""
    labels: dict[str, int] = {}
    fps: float | None = None
    spacing_mm: float | None = None
    patients: dict[str, str] = {}
    source: str = ""
    licence: str = ""


def read_json(path: Path) -> Any:
    """The content of a json file.

    Raises:
        CaseError: not valid json, with the position.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CaseError(f"{path}: not readable as json ({error}); mend it.") from None


def read_meta(folder: Path) -> ClipMeta:
    """`meta.json` of a data set of clips, or the defaults where there is none."""
    path = folder / "meta.json"
    if not path.is_file():
        return ClipMeta()
    try:
        return ClipMeta.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CaseError(f"{path}: {key}: {first['msg']} (found {first['input']!r}).") from None


def described_ref(
    folder: Path, layout: str, name: str, image: Path, masks: tuple[Path, ...], meta: ClipMeta, problem: str = ""
) -> CaseRef:
    """The reference of one image or clip of a data set with a `meta.json`."""
    missing = next((mask for mask in masks if not mask.exists()), None)
    return CaseRef(
        dataset=folder.absolute().name,
        case_id=name,
        patient_id=meta.patients.get(name, name),
        layout=layout,
        images=(image,),
        masks=masks,
        modality=meta.modality.upper(),
        labels=tuple(((value,), label) for label, value in meta.labels.items() if value != 0),
        spacing=(1.0 / meta.fps if meta.fps else 0.0, meta.spacing_mm or 0.0),
        origin=Origin.stated({"source": meta.source, "licence": meta.licence}),
        problem=problem or (f"{image}: no masks for it, expected {missing}." if missing else ""),
    )
