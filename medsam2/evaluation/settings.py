"""The settings of an evaluation, validated at the start: see configs/evaluate.yaml and configs/protocol/.

A protocol is data: which slices are prompted, with what, which way masks are carried, and what is scored
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


def _known(what: str, names: Collection[str]) -> AfterValidator:
    """Refuse a name that no rule has; `medsam2.config.validate` adds which one is closest."""

    def check(name: str) -> str:
        if name not in names:
            expected = {"expected": ", ".join(names)}
            raise PydanticCustomError("unknown_rule", f"no such {what}; known: {{expected}}", expected)
        return name

    return AfterValidator(check)


SliceRule = Annotated[str, _known("slice rule", SLICE_RULES)]
PromptRule = Annotated[str, _known("prompt rule", PROMPT_RULES)]
NegativeRule = Annotated[str, _known("rule for negative points", NEGATIVE_RULES)]


class Corrections(BaseModel):
    """Clicks that correct what was predicted: positive on what is missed, negative on what is too much.

    Each is the deepest point of the deeper of the two errors (Euclidean distance transform) on its frame.

    Attributes:
        most: at most so many clicks for one object, the points of the prompt not counted; 0 for none.
        where: "prompted": on the frames that carry the prompt, all of them before anything is carried further.
            "worst": on the frame with the lowest IoU after the whole volume or clip was predicted, and again.
        each: clicks on a frame before everything is predicted anew; on the first frame the prompt counts as one.
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
    """One protocol.

    Attributes:
        name: how the protocol is called in tables.
        slices: the rule that chooses the prompted frames (`medsam2/prompts/evaluation.py`).
        step: the k of `slices: every`.
        prompt: the rule that makes the prompt of a frame (`medsam2/prompts/evaluation.py`).
        number: at most so many components (clicks, boxes) or so many points (scattered).
        negatives: so many negative points beside the prompt. negatives_from: the rule that places them.
        direction: forward or backward from the prompt; both (forward, then backward, as SAM 2's predictor does);
            both_apart (the two passes share the prompts only); front_to_end (from frame 0, wherever the prompt is);
            alone (each prompted frame for itself, nothing is carried: the frame-wise or image mode).
        candidate: which of several candidate masks is taken: "best" (highest predicted IoU) or "first".
        corrections: correction clicks after the prompt.
        reach: "clip", or "object": nothing is predicted outside the object's first and last frame (a user who marks
            start and end).
        scored: the frames that count: "all"; "present", those that show the object; "inner", without the first and
            last of the clip; "prompted".
        seed: of prompts that are drawn. citation: where the protocol comes from.
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
        senseless = {
            f"negatives={self.negatives} with prompt={self.prompt}: a mask is taken as it is, it has no points; "
            "give negatives=0 or another prompt": mask and self.negatives > 0,
            f"corrections.most={self.corrections.most} with prompt={self.prompt}: its parts are predicted one by one "
            "and joined, so that no click belongs to one of them; give prompt=box or clicks": several and clicks,
            f"corrections.most={self.corrections.most} with prompt=mask and corrections.where=prompted: the prompted "
            "frame is the truth already; give corrections.where=worst": (
                mask and clicks and self.corrections.where == "prompted"
            ),
            "corrections.where=worst with direction=alone: nothing is carried to frames without a prompt; "
            "give corrections.where=prompted": (
                clicks and self.corrections.where == "worst" and self.direction == "alone"
            ),
            f"step={self.step} with slices={self.slices}: it counts for slices=every alone": (
                self.step > 1 and self.slices != "every"
            ),
            f"scored=prompted with direction={self.direction}: score what was carried as well, or give "
            "direction=alone": self.scored == "prompted" and self.direction != "alone",
        }
        for message, wrong in senseless.items():
            if wrong:
                raise ValueError(message)
        return self


class MetricSettings(BaseModel):
    """What is scored beyond overlaps; docs/reference/metrics.md defines every score.

    Patterns are those of the shell (`*vessel*`, `lesion`), matched against the structure's name, case and all.

    Attributes:
        nsd_mm: tolerance of the surface Dice for volumes, in mm. nsd_px: for clips and stills, in pixels.
        tolerances: structure pattern -> tolerance, in mm for volumes and in pixels elsewhere; the first pattern that
            fits decides.
        surfaces: NSD, HD95, ASSD and the boundary F of clips; false leaves them out (NaN), which is faster.
        tubes: structures whose centre-line Dice is computed (vessels, airways, catheters).
        instances: structures whose instance F1 is computed: labels that hold many things (nuclei, lesions).
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
        fitting = (value for pattern, value in self.tolerances.items() if fnmatch.fnmatchcase(structure, pattern))
        return next(fitting, self.nsd_mm if volume else self.nsd_px)


def fits_any(structure: str, patterns: Collection[str]) -> bool:
    """Whether one of the patterns fits the structure's name."""
    return any(fnmatch.fnmatchcase(structure, pattern) for pattern in patterns)


class SourceSettings(BaseModel):
    """What is evaluated: a folder of shards, or raw data in any layout that `medsam2 prepare` reads.

    Attributes:
        source: a folder or URL of shards, or a folder of raw data.
        layout, modality, config: of raw data, what `medsam2 prepare` has by these names; `config` is the yaml that
            says them (and windows, label rules, ...) for each data set below `source`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    layout: str | None = None
    modality: str | None = None
    config: str | None = None


class EvaluateSettings(BaseModel):
    """Everything that `evaluate.py` needs.

    Attributes:
        checkpoint: one or several names ("nano") or paths; the first is the baseline of every comparison.
        output: a new folder for tables, pictures and the page.
        labels: how the checkpoints are called in tables (default: short names made from the paths).
        protocol: the protocol. protocols: several of them, which then stand instead of it.
        split: the split of a shard folder ("all" for every split). limit: cases per data set, 0 for all.
        structures: keep only these structure names (empty: all).
        memory: the policy of the memory bank (configs/memory/).
        metrics: which scores, at which tolerances. corruption: what a robustness run damages, beside the clean cases.
        resume: go on in an output folder where an evaluation with the same settings stopped.
        device: "auto", "cpu", "cuda" or "cuda:N". precision: "fp32" or "bf16" (autocast).
        batch_frames: frames in one call of the image encoder.
        compile: parts of the network that run through torch.compile, which pays over hours of cases.
        max_failed: the share of cases that may fail; above it the command ends with status 2, all files written.
        overlays: pictures per protocol, data set, modality and structure. worst: pictures of the lowest scores of each
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
        """The checkpoints in order, also where one alone was given."""
        return (self.checkpoint,) if isinstance(self.checkpoint, str) else self.checkpoint

    @property
    def all_protocols(self) -> tuple[ProtocolSettings, ...]:
        """The protocols in order, also where one alone was given."""
        return self.protocols or (self.protocol,)

    @model_validator(mode="after")
    def _distinct(self) -> EvaluateSettings:
        names = [protocol.name for protocol in self.protocols]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"protocols: {', '.join(twice)} is given twice; give each protocol a name of its own")
        if not self.checkpoints:
            raise ValueError("checkpoint=[] names no checkpoint; give nano, a run folder or a file")
        if self.labels and len(self.labels) != len(self.checkpoints):
            raise ValueError(f"labels has {len(self.labels)} names, but there are {len(self.checkpoints)} checkpoints")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels={list(self.labels)}: two checkpoints have the same name")
        return self


def protocol_names() -> list[str]:
    """The protocols in configs/protocol/ by name, those of papers among them; `custom` is their template."""
    return [name for name in option_names(configs_dir() / "protocol") if name != "custom"]


def load_settings(config: Mapping[str, Any]) -> EvaluateSettings:
    """The settings of a composed configs/evaluate.yaml, with the names in `protocols` replaced by their yaml files.

    An entry of `protocols` is a name, a pattern of names ("dong_*", in the order of the alphabet), or a whole protocol
    as a mapping, which needs no file.

    Raises:
        UserError: a wrong key or value, or no such protocol; each with the closest valid one.
    """
    entries = config.get("protocols") or []
    if isinstance(entries, str):
        entries = [entries]
    protocols = [found for entry in entries for found in _protocols(entry)]
    return validate(EvaluateSettings, {**config, "protocols": protocols}, "the evaluation's configuration")


def _protocols(entry: Any) -> list[Any]:
    if not isinstance(entry, str):
        return [entry]
    names = [entry]
    if any(letter in entry for letter in "*?["):
        names = [name for name in protocol_names() if fnmatch.fnmatchcase(name, entry)]
        if not names:
            raise UserError(f"protocols: no protocol is called {entry}; docs/reference/protocols.md lists them.")
    given = ["checkpoint=nano", "data.source=none", "output=none"]  # what the composition insists on
    return [compose("evaluate", [f"protocol={name}", *given])["protocol"] for name in names]
