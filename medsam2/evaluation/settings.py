"""The settings of an evaluation, validated at the start: see configs/evaluate.yaml and configs/protocol/."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medsam2.config import compose, configs_dir, paper_options, validate
from medsam2.errors import UserError
from medsam2.evaluation.corruptions.registry import CorruptionSettings
from medsam2.evaluation.metric_settings import MetricSettings
from medsam2.evaluation.protocol_settings import Corrections, Direction, PromptRule, ProtocolSettings
from medsam2.model.memory import MemorySettings
from medsam2.model.speed import Part

__all__ = [
    "Corrections", "CorruptionSettings", "Direction", "EvaluateSettings", "MemorySettings", "MetricSettings",
    "PromptRule", "ProtocolSettings", "SourceSettings", "load_settings",
]  # fmt: skip


class SourceSettings(BaseModel):
    """What is evaluated: a folder of shards, or raw data in any layout that `medsam2 prepare` reads.

    Attributes:
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
        labels: how the checkpoints are called in tables (default: short names made from the paths).
        protocol: the protocol. protocols: several of them, which then stand instead of it.
        split: the split of a shard folder ("all" for every split). limit: cases per data set, 0 for all.
        structures: keep only these structure names (empty: all).
        memory: the policy of the memory bank (configs/memory/).
        metrics: which scores, at which tolerances. corruption: what a robustness run damages, beside the clean cases.
        resume: go on in an output folder where an evaluation with the same settings stopped.
        compile: parts of the network that run through torch.compile, which pays over hours of cases.
        max_failed: the share of cases that may fail; above it the command ends with status 2, all files written.
        overlays: pictures per protocol, modality and structure. worst: pictures of the lowest scores per protocol.
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
        return self


def protocol_names() -> list[str]:
    """The protocols in configs/protocol/ by name, those of papers among them; `custom` is their template."""
    group = configs_dir() / "protocol"
    return sorted({path.stem for path in group.glob("*.yaml") if path.stem != "custom"} | paper_options(group).keys())


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
            raise UserError(f"protocols: no protocol is called {entry}; docs/protocols.md lists them.")
    given = ["checkpoint=nano", "data.source=none", "output=none"]  # what the composition insists on
    return [compose("evaluate", [f"protocol={name}", *given])["protocol"] for name in names]
