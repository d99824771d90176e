"""Settings of a dataset: how to read and scale it, and which labels become objects.

`medsam2 prepare --config` and `data.config` of evaluate.py name a yaml. Keys at the top apply to all datasets;
keys under `datasets` apply to one and take precedence. A key there is a dataset's name, or a pattern of names or of
folders below the source.

    window: abdomen
    datasets:
      Dataset007_Pancreas:
        window: [-100, 200]
        labels: {rename: {cancer: tumour}, instances: [tumour]}
        min_voxels: 1000
        licence: CC-BY-SA-4.0
      "echo_*":
        modality: US
        axis: z
      "mri/*":
        modality: MR
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from medsam2.config import validate
from medsam2.errors import UserError, check_choice, did_you_mean

Modality = Literal["CT", "MR", "PT", "US", "ENDOSCOPY", "XRAY", "PATHOLOGY", "MICROSCOPY", "OTHER"]
MODALITIES: tuple[str, ...] = get_args(Modality)
Window = tuple[float, float]

WINDOW_PRESETS: dict[str, Window] = {
    "abdomen": (-160.0, 240.0),
    "lung": (-1350.0, 150.0),
    "brain": (0.0, 80.0),
    "mediastinum": (-125.0, 225.0),
    "bone": (-500.0, 1300.0),
}
"""CT presets as (low, high) HU: level minus and plus half the width (abdomen 40/400, lung -600/1500, ...)."""

WINDOW_RULES = ("dicom", "percentiles", "dataset-percentiles")
"""Windows computed from the data: stored in the file, percentiles of the case, percentiles of all training cases."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LabelRules(_Model):
    """Which labels become objects, and their names. Names may contain `*`; rules apply in the order of the fields.

    Attributes:
        rename: {name in the source: new name}; labels with the same new name become one structure.
        merge: {new name: names}; the listed labels become one structure.
        keep, drop: names after renaming and merging; an empty `keep` keeps all.
        instances: names of structures whose 26-connected components become separate objects (tumours, nodules).
    """

    rename: dict[str, str] = {}
    merge: dict[str, tuple[str, ...]] = {}
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()


class DatasetSettings(_Model):
    """Settings of one dataset.

    Attributes:
        modality: of every case; overrides the dataset's own description.
        patient: a regular expression with a group `patient`, searched in a case's name, e.g. `(?P<patient>[^_]+)_`;
            without a match, the patient that the layout gives, else the whole name.
        window: a preset's name, (low, high) in HU, "dicom", "percentiles" or "dataset-percentiles"; None is the default
            of the modality (CT: abdomen; other unscaled scans: percentiles). windows: several, one clip for each.
        percentiles: (low, high) percentiles of the voxels above zero.
        axis: direction of slicing: "auto" (the coarsest spacing), or x, y, z of the patient (sagittal, coronal, axial).
        channels: of a case with several channels: "each" becomes a case, only the "first" is used, or three form "rgb".
        allow_gaps: read a DICOM series with missing slices.
        threshold: foreground limit for probability maps and JPEG masks, which are refused without it. Whole numbers of
            a lossless format remain labels.
        nonfinite: replacement of NaN and infinite voxels.
        labels: see `LabelRules`. min_voxels: smallest object, over the whole case. min_pixels: smallest object, on its
            largest slice.
        source, licence: of the dataset, copied to the shards' index, checkpoints and cards.
    """

    modality: str = ""
    patient: str = ""
    window: str | Window | None = None
    windows: tuple[str | Window, ...] = ()
    percentiles: tuple[float, float] = (0.5, 99.5)
    axis: Literal["auto", "x", "y", "z"] = "auto"
    channels: Literal["each", "first", "rgb"] = "each"
    allow_gaps: bool = False
    threshold: float | None = None
    nonfinite: float | None = None
    labels: LabelRules = LabelRules()
    min_voxels: int = Field(default=1, ge=1)
    min_pixels: int = Field(default=1, ge=1)
    source: str = ""
    licence: str = ""

    @field_validator("modality")
    @classmethod
    def _known(cls, value: str) -> str:
        if value:
            check_choice("modality", value, MODALITIES)
        return value

    @field_validator("patient")
    @classmethod
    def _pattern(cls, value: str) -> str:
        try:
            groups = re.compile(value).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        if value and "patient" not in groups:
            raise ValueError("needs a group (?P<patient>...)")
        return value

    @field_validator("window", "windows", mode="before")
    @classmethod
    def _windows(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "windows":
            return tuple(check_window(entry) for entry in value)
        return None if value is None else check_window(value)

    @model_validator(mode="after")
    def _consistent(self) -> DatasetSettings:
        if self.window is not None and self.windows:
            raise ValueError("set window or windows, not both")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles {low}, {high} must be two ascending numbers between 0 and 100")
        return self

    def patient_of(self, name: str) -> str | None:
        """Return the patient in a case's name, or None if `patient` does not match."""
        match = re.search(self.patient, name) if self.patient else None
        return match["patient"] if match else None

    @property
    def clip_windows(self) -> tuple[str | Window | None, ...]:
        """The window of each clip that a case yields."""
        return self.windows or (self.window,)


def check_window(value: Any) -> str | Window:
    """Parse a window from a yaml or `--window`: `[-160, 240]`, `-160:240`, a preset or a rule.

    Raises:
        ValueError: the window has another form, or its lower bound is not below the upper one.
    """
    names = (*WINDOW_PRESETS, *WINDOW_RULES)
    if isinstance(value, str) and value in names:
        return value
    try:
        low, high = (float(part) for part in (value.split(":") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        hint = did_you_mean(value, names) if isinstance(value, str) else ""
        raise ValueError(
            f"window {value!r}: expected LO:HI, e.g. -160:240, or one of {', '.join(names)}.{hint}"
        ) from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"window {value!r}: the lower bound must be below the upper one, and both finite.")
    return (low, high)


class SettingsBook(_Model):
    """Settings of all datasets: `common`, and for each name or pattern the keys that differ."""

    common: DatasetSettings = DatasetSettings()
    datasets: dict[str, dict[str, Any]] = {}

    def of(self, dataset: str, modality: str = "CT", folder: str = "") -> DatasetSettings:
        """Return the settings of a dataset: the entry of its name, else of the first matching pattern, else common.

        A numeric window in the common settings is in HU and applies only to CT.

        Args:
            folder: the dataset's folder below the source, e.g. "mri/brains", which a pattern may match instead.
        """
        entry = self.datasets.get(dataset)
        if entry is None:
            names = (dataset, folder)
            matches = (
                e for p, e in self.datasets.items() if any(fnmatch.fnmatchcase(name, p) for name in names if name)
            )
            entry = next(matches, None)
        settings = _merged(self.common, entry) if entry else self.common
        if modality == "CT" or {"window", "windows"} & {*(entry or {})}:
            return settings
        windows = tuple(window for window in settings.windows if isinstance(window, str))
        window = settings.window if isinstance(settings.window, str) else None
        return settings.model_copy(update={"window": window, "windows": windows})


def _merged(common: DatasetSettings, entry: Mapping[str, Any]) -> DatasetSettings:
    values = common.model_dump(exclude_unset=True)
    for key, other in (("window", "windows"), ("windows", "window")):
        if key in entry:
            values.pop(other, None)
    labels = entry.get("labels")
    if isinstance(labels, Mapping):
        entry = {**entry, "labels": {**values.get("labels", {}), **labels}}
    return DatasetSettings.model_validate({**values, **entry})


def read_settings(path: Path | None, flags: Mapping[str, Any] | None = None, flag: str = "--config ") -> SettingsBook:
    """Read the settings in a yaml file, with `flags` of the command line for all datasets; None means unset.

    Args:
        flag: prefix of the file's name in errors.

    Raises:
        UserError: the file is not readable, a key is unknown (the closest one is named), or a value is invalid.
    """
    import yaml

    content: Any = {}
    if path is not None:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise UserError(f"{flag}{path}: no such file.") from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{flag}{path}: not readable as yaml ({str(error).splitlines()[0]}).") from None
        if not isinstance(content, dict):
            raise UserError(f"{flag}{path}: expected keys and values, not {type(content).__name__}.")
    datasets = content.pop("datasets", None) or {}
    set_flags = {key: value for key, value in (flags or {}).items() if value is not None}
    where = f"{flag}{path}" if path else ""
    common = validate(DatasetSettings, {**content, **set_flags}, where, flags=path is None)
    if not isinstance(datasets, dict) or not all(isinstance(e, dict) for e in datasets.values()):
        raise UserError(f"{flag}{path}: datasets: expected a name and its keys for each dataset.")
    book = SettingsBook(common=common, datasets={str(name): entry for name, entry in datasets.items()})
    for name, entry in book.datasets.items():
        validate(DatasetSettings, entry, f"{where}: datasets.{name}")
        book.of(name)
    return book
