"""The settings of an evaluation, validated at the start: see configs/evaluate.yaml and configs/protocol/.

A protocol is data: which slices are prompted, how, in which direction masks are propagated, and what is scored
(docs/reference/protocols.md).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from medsam2.config import compose, configs_dir, option_names, validate
from medsam2.errors import UserError
from medsam2.evaluation.corruptions.registry import CorruptionSettings
from medsam2.fast.execution import Part
from medsam2.inference.features import Direction
from medsam2.model.memory_bank import MemorySettings
from medsam2.prompts.evaluation import NEGATIVE_RULES, PROMPT_RULES, SLICE_RULES

Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _registered(what: str, names: Collection[str]) -> AfterValidator:
    """Validator that refuses unregistered names; `medsam2.config.validate` adds the closest one to the message."""

    def check(name: str) -> str:
        if name not in names:
            expected = {"expected": ", ".join(names)}
            raise PydanticCustomError("unknown_rule", f"no such {what}; known: {{expected}}", expected)
        return name

    return AfterValidator(check)


SliceRule = Annotated[str, _registered("slice rule", SLICE_RULES)]
PromptRule = Annotated[str, _registered("prompt rule", PROMPT_RULES)]
NegativeRule = Annotated[str, _registered("rule for negative points", NEGATIVE_RULES)]


class Corrections(BaseModel):
    """Clicks that correct a prediction: positive on false negatives, negative on false positives.

    A click is the deepest point (Euclidean distance transform) of the deeper of the two errors on its frame.

    Attributes:
        most: maximum number of clicks per object, without the points of the prompt; 0 for none.
        where: "prompted": on the frames that carry the prompt, before propagation. "worst": on the frame with the
            lowest IoU after the whole volume or clip was predicted, repeatedly.
        each: clicks on a frame before everything is predicted again; on the first frame the prompt counts as one.
        until: stop clicking on an object once its IoU (prompted frames, or all frames) is this high; 1 for never.
        depth: stop once no error on the frame is deeper than this, in pixels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    most: int = Field(0, ge=0)
    where: Literal["prompted", "worst"] = "prompted"
    each: int = Field(1, ge=1)
    until: float = Field(1.0, gt=0, le=1)
    depth: float = Field(0.0, ge=0)


class ProtocolSettings(BaseModel):
    """One evaluation protocol.

    Attributes:
        name: its name in tables.
        slices: the rule that chooses the prompted frames (`medsam2/prompts/evaluation.py`).
        step: the k of `slices: every`.
        prompt: the rule that makes the prompt of a frame (`medsam2/prompts/evaluation.py`).
        number: maximum number of components (clicks, boxes), or number of points (scattered).
        negatives: number of negative points beside the prompt. negatives_from: the rule that places them.
        direction: forward or backward from the prompt; both (forward, then backward, as SAM 2's predictor does);
            both_apart (the two passes share the prompts only); front_to_end (from frame 0, wherever the prompt is);
            alone (each prompted frame by itself, without propagation: the frame-wise or image mode).
        candidate: which of several candidate masks is used: "best" (highest predicted IoU) or "first".
        corrections: correction clicks after the prompt.
        reach: "clip", or "object": predictions before the object's first and after its last frame are cleared, as if
            a user had marked start and end.
        scored: the frames that are scored: "all"; "present", those that show the object; "inner", without the first
            and last of the clip; "prompted".
        seed: of random prompts. citation: the source of the protocol.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    slices: SliceRule = "largest"
    step: int = Field(1, ge=1)
    prompt: PromptRule = "box"
    number: int = Field(3, ge=1)
    negatives: int = Field(0, ge=0)
    negatives_from: NegativeRule = "far"
    direction: Direction = "both"
    candidate: Literal["best", "first"] = "best"
    corrections: Corrections = Corrections()
    reach: Literal["clip", "object"] = "clip"
    scored: Literal["all", "present", "inner", "prompted"] = "all"
    seed: int = 0
    citation: str = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> ProtocolSettings:
        mask, several = self.prompt == "mask", PROMPT_RULES[self.prompt].predict_separately
        clicks = self.corrections.most > 0
        where = self.corrections.where
        conflicts = {
            f"negatives={self.negatives} with prompt={self.prompt}: a mask prompt has no points; set negatives=0 or "
            "another prompt": mask and self.negatives > 0,
            f"corrections.most={self.corrections.most} with prompt={self.prompt}: its parts are predicted separately "
            "and joined, so a click cannot be assigned to one of them; set prompt=box or clicks": several and clicks,
            f"corrections.most={self.corrections.most} with prompt=mask and corrections.where=prompted: the prompted "
            "frame is the ground truth already; set corrections.where=worst": mask and clicks and where == "prompted",
            "corrections.where=worst with direction=alone: frames without a prompt have no prediction; set "
            "corrections.where=prompted": clicks and where == "worst" and self.direction == "alone",
            f"step={self.step} with slices={self.slices}: step needs slices=every; set step=1 or slices=every": (
                self.step > 1 and self.slices != "every"
            ),
            f"scored=prompted with direction={self.direction}: propagated frames would not be scored; set "
            "direction=alone or another scored": self.scored == "prompted" and self.direction != "alone",
        }
        for message, applies in conflicts.items():
            if applies:
                raise ValueError(message)
        return self


class MetricSettings(BaseModel):
    """The scores beyond overlaps; docs/reference/metrics.md defines every score.

    Patterns are shell patterns (`*vessel*`, `lesion`), matched case-sensitively against the structure's name.

    Attributes:
        nsd_mm: tolerance of the surface Dice for volumes, in mm. nsd_px: for clips and stills, in pixels.
        tolerances: structure pattern -> tolerance, in mm for volumes and in pixels elsewhere; the first pattern that
            matches applies.
        surfaces: whether to compute NSD, HD95, ASSD and the boundary F of clips (NaN otherwise, which is faster).
        tubes: structures whose centre-line Dice is computed (vessels, airways, catheters).
        instances: structures whose instance F1 is computed: labels that hold many objects (nuclei, lesions).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    nsd_mm: Tolerance = 2.0
    nsd_px: Tolerance = 2.0
    tolerances: dict[str, Tolerance] = Field(default_factory=dict)
    surfaces: bool = True
    tubes: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()

    def tolerance(self, structure: str, volume: bool) -> float:
        """Tolerance of the surface Dice of a structure: mm for volumes, pixels for clips and stills."""
        matches = (value for pattern, value in self.tolerances.items() if fnmatch.fnmatchcase(structure, pattern))
        return next(matches, self.nsd_mm if volume else self.nsd_px)


def matches_any(structure: str, patterns: Collection[str]) -> bool:
    """Whether one of the patterns matches the structure's name."""
    return any(fnmatch.fnmatchcase(structure, pattern) for pattern in patterns)


class SourceSettings(BaseModel):
    """The data to evaluate on: a folder of shards, or raw data in any layout that `medsam2 prepare` reads.

    Attributes:
        source: a folder or URL of shards, or a folder of raw data.
        layout, modality, config: for raw data only, the options of `medsam2 prepare` with these names; `config` is a
            yaml file with the settings (also windows, label rules, ...) of each dataset below `source`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    layout: str | None = None
    modality: str | None = None
    config: str | None = None


class EvaluateSettings(BaseModel):
    """The settings of `evaluate.py`.

    Attributes:
        checkpoint: one or several names ("nano") or paths; the first is the baseline of every comparison.
        output: a new folder for tables, pictures and the page.
        labels: names of the checkpoints in tables (default: short names made from the paths).
        protocol: the protocol. protocols: several protocols; they replace `protocol`.
        split: the split of a shard folder ("all" for every split). limit: cases per dataset, 0 for all.
        structures: evaluate only structures with these names (empty: all).
        memory: the policy of the memory bank (configs/memory/).
        metrics: which scores, at which tolerances. corruption: the corruptions of a robustness run, evaluated in
            addition to the clean cases.
        resume: continue in an output folder where an evaluation with the same settings stopped.
        device: "auto", "cpu", "cuda" or "cuda:N". precision: "fp32" or "bf16" (autocast).
        batch_frames: frames per call of the image encoder.
        compile: parts of the network that run through torch.compile; it pays off if evaluation takes hours.
        max_failed: the share of cases that may fail; above it the command writes all files and exits with status 2.
        overlays: pictures per protocol, dataset, modality and structure. worst: pictures of the lowest scores of each
            protocol.
        seed: of the bootstrap and the corruptions. resamples: of the bootstrap.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str | tuple[str, ...]
    data: SourceSettings
    output: str
    protocol: ProtocolSettings = ProtocolSettings(name="largest_box_both")
    protocols: tuple[ProtocolSettings, ...] = ()
    labels: tuple[str, ...] = ()
    split: str = "val"
    limit: int = Field(0, ge=0)
    structures: tuple[str, ...] = ()
    memory: MemorySettings = MemorySettings()
    metrics: MetricSettings = MetricSettings()
    corruption: CorruptionSettings = CorruptionSettings()
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: tuple[Part, ...] = ()
    batch_frames: int = Field(8, ge=1)
    resume: bool = False
    max_failed: float = Field(0.1, ge=0, le=1)
    overlays: int = Field(2, ge=0)
    worst: int = Field(6, ge=0)
    seed: int = 0
    resamples: int = Field(5000, ge=100)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """All checkpoints in order, as a tuple even if there is one."""
        return (self.checkpoint,) if isinstance(self.checkpoint, str) else self.checkpoint

    @property
    def all_protocols(self) -> tuple[ProtocolSettings, ...]:
        """All protocols in order, as a tuple even if there is one."""
        return self.protocols or (self.protocol,)

    @model_validator(mode="after")
    def _check_names(self) -> EvaluateSettings:
        names = [protocol.name for protocol in self.protocols]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"protocols: {', '.join(duplicates)} is used twice; give each protocol a unique name")
        if not self.checkpoints:
            raise ValueError("checkpoint=[] names no checkpoint; set it to nano, a run folder or a file")
        if self.labels and len(self.labels) != len(self.checkpoints):
            raise ValueError(f"labels has {len(self.labels)} names, but there are {len(self.checkpoints)} checkpoints")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels={list(self.labels)}: two checkpoints have the same name")
        return self


def protocol_names() -> list[str]:
    """Names of the protocols in configs/protocol/, without the template `custom`."""
    return [name for name in option_names(configs_dir() / "protocol") if name != "custom"]


def load_settings(config: Mapping[str, Any]) -> EvaluateSettings:
    """Validate a composed configs/evaluate.yaml and load the protocols that `protocols` names.

    An entry of `protocols` is a name, a pattern of names ("dong_*", sorted alphabetically), or a whole protocol as a
    mapping, which needs no file.

    Raises:
        UserError: a wrong key or value, or no such protocol; the message names the closest valid one.
    """
    entries = config.get("protocols") or []
    if isinstance(entries, str):
        entries = [entries]
    protocols = [protocol for entry in entries for protocol in _load_protocols(entry)]
    return validate(EvaluateSettings, {**config, "protocols": protocols}, "the evaluation's configuration")


def _load_protocols(entry: Any) -> list[Any]:
    if not isinstance(entry, str):
        return [entry]
    names = [entry]
    if any(letter in entry for letter in "*?["):
        names = [name for name in protocol_names() if fnmatch.fnmatchcase(name, entry)]
        if not names:
            raise UserError(f"protocols: no protocol is called {entry}; docs/reference/protocols.md lists them.")
    required = ["checkpoint=nano", "data.source=none", "output=none"]  # compose fails without these keys
    return [compose("evaluate", [f"protocol={name}", *required])["protocol"] for name in names]
