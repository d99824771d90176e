"""What validation finds, as plain rows that all ranks exchange once, and the figures that follow from them.

Metrics kept by key on each rank would need the same keys everywhere: ranks whose cases show other structures would
wait for each other for ever. Rows have no such rule, and a rank that has none takes part with an empty list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from medsam2.training.tradeoff import GAIN, RETENTION

RowT = TypeVar("RowT")


@dataclass(frozen=True, order=True)
class ScoreRow:
    """The Dice of one object of one case under one protocol.

    Attributes:
        old: of what the starting model knew. own: of the run's own data, not of `validation.general`.
        modality: "" where it is not known.
    """

    protocol: str
    dataset: str
    case: str
    object: int
    structure: str
    dsc: float
    old: bool = False
    own: bool = True
    modality: str = ""


@dataclass(frozen=True)
class StructureRow:
    """The mean DSC of one structure at one validation: a line of validation.csv.

    Attributes:
        data: "own", or "general" for `validation.general`. cases, objects: how many the mean is over.
    """

    step: int
    protocol: str
    data: str
    modality: str
    structure: str
    cases: int
    objects: int
    dsc: float


@dataclass(frozen=True, order=True)
class ObedienceRow:
    """Whether one prompt on one frame was obeyed; `probe` is "box" or "far_click" (`retention.probe_obedience`)."""

    probe: str
    dataset: str
    case: str
    object: int
    obeyed: bool


@dataclass(frozen=True, order=True)
class ClipRow:
    """The loss of one fixed validation clip, which its seed names."""

    seed: int
    loss: float


def gather_rows(rows: Sequence[RowT]) -> list[RowT]:
    """The rows of all ranks, rank by rank; every rank must call it, and gets the same list."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(rows)
    parts: list[list[RowT]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, list(rows))
    return [row for part in parts for row in part]


def mean_scores(rows: Iterable[ScoreRow]) -> dict[str, float]:
    """Mean DSC over all rows of the run's own data ("val/dsc"), by protocol, protocol and data set, and structure.

    By modality and structure it is "val/CT/dsc" and "val/CT/liver/dsc". Rows of new data sets give "val/gain",
    those of old ones, general data among them, "val/retention".

    A case that two ranks scored counts once, and sums are taken in sorted order: the figures do not depend on how
    cases were split over ranks.
    """
    found: dict[str, list[float]] = {}
    for row in each_once(rows):
        of_protocol = f"val/{row.protocol}/dsc"
        keys = ["val/dsc", of_protocol, f"val/{row.protocol}/{row.dataset}/dsc", f"val/{row.structure}/dsc"]
        if row.modality:
            keys += [f"val/{row.modality}/dsc", f"val/{row.modality}/{row.structure}/dsc"]
        for key in [*(keys if row.own else []), RETENTION if row.old else GAIN]:
            found.setdefault(key, []).append(row.dsc)
    return {key: math.fsum(values) / len(values) for key, values in found.items()}


def each_once(rows: Iterable[ScoreRow]) -> list[ScoreRow]:
    """The rows in a fixed order, an object that two ranks scored once."""
    once = {(row.own, row.protocol, row.dataset, row.case, row.object): row for row in sorted(rows, reverse=True)}
    return sorted(once.values())


def by_structure(rows: Iterable[ScoreRow], step: int) -> list[StructureRow]:
    """The mean DSC of each protocol, modality and structure, general data apart."""
    groups: dict[tuple[str, str, str, str], list[ScoreRow]] = {}
    for row in each_once(rows):
        key = (row.protocol, "own" if row.own else "general", row.modality, row.structure)
        groups.setdefault(key, []).append(row)
    return [
        StructureRow(
            step, *key, cases=len({(row.dataset, row.case) for row in found}), objects=len(found),
            dsc=math.fsum(row.dsc for row in found) / len(found),
        )
        for key, found in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != "own", item[0]))
    ]  # fmt: skip


def mean_obedience(rows: Iterable[ObedienceRow]) -> dict[str, float]:
    """Share of obeyed boxes ("val/obedience") and far clicks ("val/obedience_far_click"); each prompt once."""
    once = {(row.probe, row.dataset, row.case, row.object): row for row in sorted(rows, reverse=True)}
    found: dict[str, list[bool]] = {}
    for row in once.values():
        found.setdefault("val/obedience" if row.probe == "box" else f"val/obedience_{row.probe}", []).append(row.obeyed)
    return {key: sum(values) / len(values) for key, values in sorted(found.items())}


def mean_loss(rows: Iterable[ClipRow]) -> float:
    """Mean over clips, each once."""
    losses = {row.seed: row.loss for row in sorted(rows, reverse=True)}
    return math.fsum(losses.values()) / len(losses)


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over ranks by one collective; all ranks must have the same keys."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    device = next(iter(values.values())).device
    stacked = torch.stack([value.detach().to(device, torch.float32) for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / dist.get_world_size()).unbind(), strict=True))
