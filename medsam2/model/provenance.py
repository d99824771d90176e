"""The metadata of a checkpoint, as one versioned model.

It is stored as plain values: under the key "medsam2" of a `.pt` or `.ckpt`, as JSON in the header of a
`.safetensors`, and as `medsam2.json` beside an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from medsam2.adaptation.freeze import AdaptationSettings
from medsam2.config import validate
from medsam2.errors import UserError
from medsam2.files import file_name
from medsam2.model.sizes import ModelSpec

if TYPE_CHECKING:
    from medsam2.prompts.settings import PromptSettings

SCHEMA_VERSION = 1


class BaseRecord(BaseModel):
    """The base weights of an adapter: file name without its folder, and digest of the tensors (`tensor_digest`)."""

    model_config = ConfigDict(frozen=True)

    file: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("file")
    @classmethod
    def _is_a_plain_name(cls, file: str) -> str:
        if file in ("", ".", "..") or file != file_name(file):
            raise ValueError("it must be the name of a file, without a folder")
        return file


class AdapterProvenance(BaseModel):
    """The base and the settings of an adapter that is not merged into the weights, from which it can be rebuilt."""

    model_config = ConfigDict(frozen=True)

    base: BaseRecord
    adaptation: AdaptationSettings


class Provenance(BaseModel):
    """Metadata of a checkpoint; every field may be missing, as in Meta's files.

    Keys that this version does not know are ignored; a later schema version is refused.

    Attributes:
        spec: the network.
        start: source of the weights that the run started from.
        seed, step: random seed and number of optimiser steps of the run.
        content_hashes: hashes of the training cases, by which an evaluation detects leaks.
        datasets: source and licence by name of the dataset.
        recipe: the parts of the configuration that describe the training (`prompts`, `optim`, `adaptation` ...).
        adapter: an adapter that is not merged.
        interpolated: position between the start (0) and the end (1) of a fine-tuning.
        weights: for a run with a moving average, "moving average" or "of the last step, not averaged".
        dtype: "bf16" if the weights were rounded to bfloat16.
        trained_image_size: side of the model's input in training, px, if the export has another one.
        imported: file and kind of the checkpoint that was imported. exported_by: the program that exported it.
        data, licence, phase, commit, versions: only in the checkpoint that the package ships.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = Field(SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)
    spec: ModelSpec | None = None
    start: str | None = None
    seed: int | None = None
    step: int | None = Field(None, ge=0)
    content_hashes: tuple[str, ...] = ()
    datasets: dict[str, dict[str, str]] = Field(default_factory=dict)
    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    adapter: AdapterProvenance | None = None
    interpolated: float | None = Field(None, ge=0, le=1)
    weights: str | None = None
    dtype: str | None = None
    trained_image_size: int | None = None
    imported: str | None = None
    exported_by: str | None = None
    data: str | None = None
    licence: str | None = None
    phase: str | None = None
    commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_earlier_forms(cls, values: Any) -> Any:
        """Convert dictionaries from before the schema had a version."""
        if not isinstance(values, Mapping):
            return values
        known = {key: value for key, value in values.items() if value is not None}
        if isinstance(known.get("recipe"), str):  # only the name of the recipe's file
            known["recipe"] = {"file": known["recipe"]}
        if isinstance(known.get("recipe"), Mapping) and "keep" in known["recipe"]:  # until version 0.2
            known["recipe"] = {"retention" if key == "keep" else key: part for key, part in known["recipe"].items()}
        if "steps_of_last_phase" in known:  # of the shipped nano
            known.setdefault("step", known["steps_of_last_phase"])
        if "base" in known and "adaptation" in known:  # of an adapter's medsam2.json
            known.setdefault("adapter", {"base": known["base"], "adaptation": known["adaptation"]})
        return known

    def to_dict(self) -> dict[str, Any]:
        """Return strings, numbers, lists and dictionaries, which `torch.load(weights_only=True)` accepts."""
        return self.model_dump(mode="json", exclude_none=True)

    def recipe_part(self, name: str) -> dict[str, Any]:
        """Return one section of the recipe, or {} if it is missing."""
        part = self.recipe.get(name)
        return dict(part) if isinstance(part, Mapping) else {}

    @property
    def trained_prompts(self) -> PromptSettings | None:
        """Prompt settings of the training; None if the checkpoint does not state them.

        Raises:
            UserError: the recipe's prompts are not valid settings.
        """
        from medsam2.prompts.settings import PromptSettings

        prompts = self.recipe_part("prompts")
        return validate(PromptSettings, prompts, "recipe.prompts of the checkpoint") if prompts else None

    def untrained(self, rules: Iterable[str], corrections: bool, negatives: bool) -> tuple[str, str]:
        """Describe the requested prompts that this checkpoint was not trained with, and those of its training.

        Args:
            rules: names of prompt rules (`PROMPT_RULES`).
            corrections: whether there are correction clicks.
            negatives: whether there are negative points beside the prompts.

        Returns:
            the prompts without training, "" for none; the prompts of the training, "" if unknown.
        """
        from medsam2.prompts.evaluation import PROMPT_RULES

        prompts = self.trained_prompts
        if prompts is None:
            return "", ""
        trained = {kind for kind, weight in prompts.kinds.items() if weight > 0}
        corrected = prompts.corrections > 0 and prompts.correction_frames > 0 and prompts.correction_probability > 0
        missing = []
        for name in rules:
            needed = PROMPT_RULES[name].trained_kinds
            if needed and not trained & set(needed):
                missing.append(f"prompts of the kind {name}")
        if corrections and not corrected:
            missing.append("correction clicks")
        if negatives and not corrected and not ("points" in trained and prompts.points.negatives[1] > 0):
            missing.append("negative points")
        return " and ".join(missing), ", ".join(sorted(trained))


def read_provenance(values: Any, source: str | Path) -> Provenance:
    """Validate the metadata of the file `source`; `values` None gives an empty `Provenance`.

    Raises:
        UserError: a field is not valid; the message names the file, the field and its value.
    """
    if values is None:
        return Provenance()
    try:
        return validate(Provenance, values, f"the metadata of {source}")
    except RecursionError:
        raise UserError(f"the metadata of {source} is nested too deeply; get the file again.") from None
    except UserError as error:
        raise UserError(
            f"{error} Get the file again, update medsam2 if a later version wrote it, or save its weights alone as "
            "{'model': state_dict}."
        ) from None
