"""Validate: score whole cases on each rank, gather the rows of all ranks once, and compute means from them.

The scores of the starting model, and the share of prompts that are obeyed, show a collapse: a collapsed model still
scores well on the data it was tuned on, but not on old data or on prompts for other objects.

Scores are gathered as plain rows. Metrics that are reduced by key need the same keys on every rank: ranks whose cases
show different structures would wait for each other forever. A rank without cases takes part with an empty list.

Legend: N objects, T frames, H and W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from medsam2.adaptation.anchors import Anchors
from medsam2.adaptation.interpolate import interpolate, save_interpolated
from medsam2.adaptation.lora import official_state
from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.evaluation.run.score_case import MAX_OBJECTS_PER_BATCH, score_cases
from medsam2.evaluation.settings import ProtocolSettings
from medsam2.files import write_text
from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.build import build_sam
from medsam2.model.policies import make_policy
from medsam2.model.tracker import Tracker
from medsam2.prompts.evaluation import tight_box
from medsam2.training.settings import TradeoffSettings, TrainSettings, ValidationSettings

GAIN, RETENTION, OBEDIENCE, TRADEOFF = "val/gain", "val/retention", "val/obedience", "val/tradeoff"
VALIDATION = "validation.csv"
START = "_start"  # what the name of a figure of the starting model ends with
START_SCORES, INTERPOLATION = "start_scores.json", "interpolation.json"

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class ScoreRow:
    """The Dice of one object of one case under one protocol.

    Attributes:
        old: belongs to what the starting model knew.
        general: comes from `validation.general`, not from the run's datasets.
        modality: "" where it is not known.
    """

    protocol: str
    dataset: str
    case: str
    object: int
    structure: str
    dsc: float
    old: bool = False
    general: bool = False
    modality: str = ""


def gather_rows(rows: Sequence[RowT]) -> list[RowT]:
    """The rows of all ranks, rank by rank; every rank must call it, and gets the same list."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(rows)
    parts: list[list[RowT]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, list(rows))
    return [row for part in parts for row in part]


def mean_scores(rows: Iterable[ScoreRow]) -> dict[str, float]:
    """Compute the mean DSC of the run's datasets ("val/dsc"), by protocol, protocol and dataset, and structure.

    By modality and structure it is "val/CT/dsc" and "val/CT/liver/dsc". Rows of new datasets give "val/gain",
    those of old ones, general data among them, "val/retention".

    Sums are exact before they are rounded: the figures do not depend on how cases were split over ranks.
    """
    scores: dict[str, list[float]] = {}
    for row in rows:
        of_protocol = f"val/{row.protocol}/dsc"
        keys = ["val/dsc", of_protocol, f"val/{row.protocol}/{row.dataset}/dsc", f"val/{row.structure}/dsc"]
        if row.modality:
            keys += [f"val/{row.modality}/dsc", f"val/{row.modality}/{row.structure}/dsc"]
        for key in [*([] if row.general else keys), RETENTION if row.old else GAIN]:
            scores.setdefault(key, []).append(row.dsc)
    return {key: fmean(values) for key, values in scores.items()}


def by_structure(rows: Iterable[ScoreRow], step: int) -> list[dict[str, Any]]:
    """The mean DSC of each protocol, modality and structure, general data apart: the lines of validation.csv."""
    import pandas as pd  # at the first validation, not when a run starts

    table = pd.DataFrame([vars(row) for row in rows])
    table["data"] = np.where(table["general"], "general", "own")
    table["case"] = table["dataset"] + "/" + table["case"]
    groups = table.groupby(["protocol", "data", "modality", "structure"])
    means = groups.agg(cases=("case", "nunique"), objects=("dsc", "size"), dsc=("dsc", "mean")).reset_index()
    means = means.sort_values(["protocol", "data"], ascending=[True, False], kind="stable")
    means.insert(0, "step", step)
    return means.to_dict("records")


def mean_obedience(obeyed: Sequence[bool]) -> dict[str, float]:
    """Share of obeyed boxes ("val/obedience"); empty where there is none."""
    return {OBEDIENCE: fmean(obeyed)} if obeyed else {}


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over ranks by one collective; all ranks must have the same keys."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    device = next(iter(values.values())).device
    stacked = torch.stack([value.detach().to(device, torch.float32) for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / dist.get_world_size()).unbind(), strict=True))


# ---------------------------------------------------------------------------------------------------- the trade-off


def tradeoff(values: Mapping[str, float], settings: TradeoffSettings) -> float:
    """`gain` times the change on what is learned, less `retention` times what is lost beyond what is allowed.

    Args:
        values: "val/gain", "val/retention" and the starting model's "..._start"; a kind that validation does not
            have counts as unchanged, and where the start is not known (random weights) it counts as 0.
    """
    change = {key: values[key] - values.get(key + START, 0.0) for key in (GAIN, RETENTION) if key in values}
    lost = min(change.get(RETENTION, 0.0) + settings.allowed, 0.0)
    return settings.gain * change.get(GAIN, 0.0) + settings.retention * lost


def best_monitor(settings: TradeoffSettings | None, cases: int) -> tuple[str, str]:
    """What the best checkpoint goes by, and whether "max" or "min" of it is best."""
    if not cases:
        return "val/loss", "min"
    return (TRADEOFF if settings is not None else "val/dsc"), "max"


# ---------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, eq=False)
class ValidationCase:
    """A whole case of validation.

    Attributes:
        old: whether it belongs to what the starting model knew.
        general: whether it comes from `validation.general` and not from the run's datasets.
    """

    case: LoadedCase
    old: bool = False
    general: bool = False


def probe(
    tracker: Tracker, case: ValidationCase, protocols: Iterable[ProtocolSettings]
) -> tuple[list[ScoreRow], list[bool]]:
    """The scores of a case under each protocol, and for each prompt whether prompts on one of its frames is obeyed."""
    rows = [
        ScoreRow(
            protocol.name,
            row.dataset,
            row.case,
            row.object,
            row.structure,
            row.dsc,
            case.old,
            case.general,
            row.modality,
        )
        for protocol in protocols
        for row in score_cases(tracker, [case.case], protocol)
    ]
    return rows, probe_obedience(tracker, case.case)


def probe_all(tracker: Tracker, cases: Iterable[ValidationCase], validation: ValidationSettings) -> dict[str, float]:
    """The means over the cases of all ranks, `val/tradeoff` apart; every rank must call it, and gets the same."""
    probes = [probe(tracker, case, validation.protocols) for case in cases]
    scores = gather_rows([row for rows, _ in probes for row in rows])
    obeyed = gather_rows([box for _, boxes in probes for box in boxes])
    return {**mean_scores(scores), **mean_obedience(obeyed)}


# ---------------------------------------------------------------------------------------------------- obedience


def probe_obedience(tracker: Tracker, case: LoadedCase) -> list[bool]:
    """Prompt each of several objects of one frame (the 16 largest) by its box, and tell for each whether it is obeyed.

    The frame is the one whose second-largest object is largest; a case that never shows two objects has none. A
    box is obeyed if its mask overlaps the target most (IoU); a collapsed model returns the frame's largest object
    whatever the box says.
    """
    areas = np.array([case.mask(number).sum((1, 2)) for number in range(len(case.objects))])  # [N, T]
    if len(areas) < 2 or not np.sort(areas, 0)[-2].any():
        return []
    frame = int(np.argmax(np.sort(areas, 0)[-2]))
    largest_first = np.argsort(-areas[:, frame], kind="stable")[:MAX_OBJECTS_PER_BATCH]
    shown = np.sort(largest_first[areas[largest_first, frame] > 0])
    truths = np.stack([case.mask(int(number))[frame] for number in shown])
    prompts = [FramePrompt(0, index, box=tight_box(truth)) for index, truth in enumerate(truths)]
    predicted = Predictor(tracker).predict(case.frames[frame : frame + 1], prompts, "forward").masks[:, 0].numpy()
    return [overlaps_target_most(predicted[index], truths, index) for index in range(len(shown))]


def overlaps_target_most(predicted: np.ndarray, truths: np.ndarray, target: int) -> bool:
    """Whether a mask bool [H, W] overlaps `truths[target]` more than any other of bool [N, H, W]."""
    overlap = (truths & predicted).sum((1, 2)) / np.maximum((truths | predicted).sum((1, 2)), 1)
    return bool(overlap[target] > 0 and overlap[target] > np.delete(overlap, target).max(initial=0.0))


# ---------------------------------------------------------------------------------------------------- the start


def start_scores(trainer: L.Trainer, settings: TrainSettings, tracker: Tracker) -> dict[str, float]:
    """What the starting model scores, by "val/..._start": measured at the first step, then read from the run folder.

    Every rank must call it. Random weights know nothing: they are not measured. A run that is resumed without the
    file (one of an earlier version) goes on without these figures.
    """
    path = Path(settings.output) / START_SCORES
    content = path.read_text(encoding="utf-8") if trainer.is_global_zero and path.is_file() else "null"
    known = trainer.strategy.broadcast(json.loads(content))
    if known is None and trainer.global_step == 0 and settings.start != "random":
        cases = trainer.datamodule.validation_cases  # type: ignore[attr-defined]
        values = probe_all(tracker, cases, settings.validation)
        known = {key + START: values[key] for key in (GAIN, RETENTION, OBEDIENCE) if key in values}
        _write(path, known)
    return dict(known or {})


@rank_zero_only
def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def with_tradeoff(values: dict[str, float], start: dict[str, float], settings: ValidationSettings) -> dict[str, float]:
    """`values` with the start's beside them, and `val/tradeoff` where it is asked for."""
    beside = {key: value for key, value in start.items() if key.removesuffix(START) in values}
    with_start = {**values, **beside}
    if settings.tradeoff is not None:
        with_start[TRADEOFF] = tradeoff(with_start, settings.tradeoff)
    return with_start


# ---------------------------------------------------------------------------------------------------- the end


class InterpolateAtEnd(Callback):
    """Scores weights between start and end once training is over, and keeps the best.

    Writes `interpolation.json` (one row per share, the end among them) and `checkpoints/interpolated.ckpt`, which holds
    official weights with adapters merged.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        folder, anchors = Path(self.settings.output), pl_module.anchors
        assert isinstance(anchors, Anchors)
        sam = pl_module.tracker.sam
        start, end = anchors.start_state(sam), official_state(sam)
        cases = trainer.datamodule.validation_cases  # type: ignore[attr-defined]
        shares = sorted({*self.settings.retention.interpolate, 1.0})
        network = build_sam(pl_module.spec).to(pl_module.device)
        scratch = Tracker(network, make_policy(self.settings.memory, network)).eval()
        rows = []
        for share in shares:
            scratch.sam.load_state_dict(interpolate(start, end, share))
            values = probe_all(scratch, cases, self.settings.validation)
            rows.append({"share": share, **with_tradeoff(values, pl_module.start_scores, self.settings.validation)})
        best = best_share(rows, best_monitor(self.settings.validation.tradeoff, 1)[0])
        _write(folder / INTERPOLATION, {"best": best, "shares": rows})
        # The official state has the adapter merged in.
        update = {"adapter": None, "step": int(trainer.global_step), "interpolated": best}
        provenance = pl_module.provenance.model_copy(update=update)
        state = {name: value.cpu() for name, value in interpolate(start, end, best).items()}
        rank_zero_only(save_interpolated)(folder / "checkpoints" / "interpolated.ckpt", state, provenance)


def best_share(rows: Sequence[dict[str, float]], monitor: str) -> float:
    """The share with the highest `monitor`; of equals the one nearest to the start."""
    return float(max(rows, key=lambda row: (row[monitor], -row["share"]))["share"])
