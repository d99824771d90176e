"""What a checkpoint says about itself: one versioned model, and the one place that reads it.

It travels as plain values: under the key "medsam2" of a `.pt` or `.ckpt`, as JSON in the header of a `.safetensors`,
and as `medsam2.json` beside an adapter.
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
    """The weights under an adapter: file name without its folder, and digest of the tensors (`tensor_digest`)."""

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
    """What an adapter belongs to, and how it is built again: present where the weights hold one that is not merged."""

    model_config = ConfigDict(frozen=True)

    base: BaseRecord
    adaptation: AdaptationSettings


class Provenance(BaseModel):
    """What a checkpoint says about itself; every part may be missing, as in Meta's files.

    Keys that this version does not know are left out, and a later schema is refused.

    Attributes:
        spec: the network.
        start: where the run's first weights came from.
        seed, step: of the run; optimiser steps.
        content_hashes: of the training cases, so that an evaluation can tell a leak.
        datasets: source and licence by name of the dataset.
        recipe: the parts of the configuration that say how it was trained (`prompts`, `optim`, `adaptation` ...).
        adapter: see there.
        interpolated: share of the way from the start (0) to the end (1) of a fine-tuning.
        weights: which ones, of a run that averaged. dtype: "bf16" where they were rounded to bfloat16.
        trained_image_size: side of the model's input in training, px, where it is exported at another.
        imported: file and kind of a checkpoint that came from elsewhere. exported_by: the program.
        data, licence, phase, commit, versions: of the checkpoint that the package ships.
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
        """Dictionaries from before the schema had a version."""
        if not isinstance(values, Mapping):
            return values
        known = {key: value for key, value in values.items() if value is not None}
        if isinstance(known.get("recipe"), str):  # the file alone
            known["recipe"] = {"file": known["recipe"]}
        if isinstance(known.get("recipe"), Mapping) and "keep" in known["recipe"]:  # until version 0.2
            known["recipe"] = {"retention" if key == "keep" else key: part for key, part in known["recipe"].items()}
        if "steps_of_last_phase" in known:  # of the shipped nano
            known.setdefault("step", known["steps_of_last_phase"])
        if "base" in known and "adaptation" in known:  # of an adapter's medsam2.json
            known.setdefault("adapter", {"base": known["base"], "adaptation": known["adaptation"]})
        return known

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dictionaries, which every consumer of a checkpoint can unpickle."""
        return self.model_dump(mode="json", exclude_none=True)

    def recipe_part(self, name: str) -> dict[str, Any]:
        """One section of the recipe; {} where it has none."""
        part = self.recipe.get(name)
        return dict(part) if isinstance(part, Mapping) else {}

    @property
    def trained_prompts(self) -> PromptSettings | None:
        """The prompts of the training; None where the checkpoint does not state them.

        Raises:
            UserError: they are no settings of prompts.
        """
        from medsam2.prompts.settings import PromptSettings

        prompts = self.recipe_part("prompts")
        return validate(PromptSettings, prompts, "recipe.prompts of the checkpoint") if prompts else None

    def untrained(self, rules: Iterable[str], corrections: bool, negatives: bool) -> tuple[str, str]:
        """In words: what of some prompts this checkpoint was not trained with ("" for nothing), and what it was.

        Args:
            rules: names of prompts (`PROMPT_RULES`).
            corrections: there are clicks on errors.
            negatives: there are negative points beside the prompts.
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
    """What the file `source` says about itself; `values` None gives an empty one.

    Raises:
        UserError: the file, the field that is wrong, and its value.
    """
    if values is None:
        return Provenance()
    try:
        return validate(Provenance, values, f"{source}, what the file says about itself")
    except RecursionError:
        raise UserError(
            f"{source}: what the file says about itself is nested too deeply; get the file again."
        ) from None
    except UserError as error:
        raise UserError(
            f"{error} Get the file again, update medsam2 if a later version wrote it, or save its weights alone as "
            "{'model': state_dict}."
        ) from None
