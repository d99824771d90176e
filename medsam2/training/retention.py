"""What validation says about forgetting: the starting model's score beside ours, and whether prompts are obeyed.

A fine-tuned model that has collapsed still scores well on what it was tuned on; it is seen on what it knew before, and
on prompts for something else than it has learned to expect.

Legend: N objects, T frames, H and W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities import rank_zero_only
from scipy import ndimage
from torch import Tensor

from medsam2.evaluation.predictor import FramePrompt, Predictor
from medsam2.evaluation.quick import OBJECTS_AT_ONCE, LoadedCase, score_cases
from medsam2.evaluation.settings import ProtocolSettings
from medsam2.files import atomic_write
from medsam2.model.anchors import Anchors
from medsam2.model.build import LIGHTNING_PREFIX, build_sam
from medsam2.model.interpolate import interpolate
from medsam2.model.lora import official_state
from medsam2.model.tracker import Tracker
from medsam2.prompts.strategies import tight_box
from medsam2.training.settings import TrainSettings, ValidationSettings
from medsam2.training.tradeoff import GAIN, RETENTION, START, TRADEOFF, best_monitor, tradeoff
from medsam2.training.validation import ObedienceRow, ScoreRow, gather_rows, mean_obedience, mean_scores

START_SCORES, INTERPOLATION = "start_scores.json", "interpolation.json"
KEPT = (GAIN, RETENTION, "val/obedience", "val/obedience_far_click")
FAR_SHARE = 0.5  # a far click returns an object if its mask holds so much of it


@dataclass(frozen=True, eq=False)
class ValidationCase:
    """A whole case of validation.

    Attributes:
        old: whether it is of what the starting model knew.
        own: whether it is of the run's own data, and not of `validation.general`.
    """

    case: LoadedCase
    old: bool = False
    own: bool = True


@dataclass(frozen=True)
class Probed:
    """What one validation of a model found."""

    scores: list[ScoreRow]
    obedience: list[ObedienceRow]


def probe(tracker: Tracker, case: ValidationCase, protocols: Iterable[ProtocolSettings]) -> Probed:
    """The scores of a case under each protocol, and whether prompts on one of its frames are obeyed."""
    rows = [
        ScoreRow(
            protocol.name, row.dataset, row.case, row.object, row.structure, row.dsc, case.old, case.own, row.modality
        )
        for protocol in protocols
        for row in score_cases(tracker, [case.case], protocol)
    ]
    return Probed(rows, probe_obedience(tracker, case.case))


def probe_all(tracker: Tracker, cases: Iterable[ValidationCase], validation: ValidationSettings) -> dict[str, float]:
    """The means over the cases of all ranks, `val/tradeoff` apart; every rank must call it, and gets the same."""
    found = [probe(tracker, case, validation.protocols) for case in cases]
    scores = gather_rows([row for probed in found for row in probed.scores])
    obedience = gather_rows([row for probed in found for row in probed.obedience])
    return {**mean_scores(scores), **mean_obedience(obedience)}


# ---------------------------------------------------------------------------------------------------- obedience


def probe_obedience(tracker: Tracker, case: LoadedCase) -> list[ObedienceRow]:
    """Boxes on each of several objects of one frame (the 16 largest), and a click far from all of them.

    The frame is the one whose second-largest object is largest; a case that never shows two objects has no rows. A
    box is obeyed if its mask overlaps its own object most (IoU). The far click is obeyed if its mask holds less than
    half of the frame's largest object, which a collapsed model returns whatever is asked.
    """
    areas = np.array([case.mask(number).sum((1, 2)) for number in range(len(case.objects))])  # [N, T]
    if len(areas) < 2 or not np.sort(areas, 0)[-2].any():
        return []
    frame = int(np.argmax(np.sort(areas, 0)[-2]))
    largest_first = np.argsort(-areas[:, frame], kind="stable")[:OBJECTS_AT_ONCE]
    shown = np.sort(largest_first[areas[largest_first, frame] > 0])
    truths = np.stack([case.mask(int(number))[frame] for number in shown])
    prompts = [FramePrompt(0, index, box=tight_box(truth)) for index, truth in enumerate(truths)]
    far = far_point(truths)
    if far is not None:
        prompts.append(FramePrompt(0, len(truths), points=np.array([far], np.float32), labels=np.array([1], np.int32)))
    predicted = Predictor(tracker).predict(case.frames[frame : frame + 1], prompts, "forward").masks[:, 0].numpy()
    rows = [
        ObedienceRow("box", case.dataset, case.case, int(number), own_is_best(predicted[index], truths, index))
        for index, number in enumerate(shown)
    ]
    if far is not None:
        largest = truths[int(np.argmax(truths.sum((1, 2))))]
        returned = bool((predicted[-1] & largest).sum() >= FAR_SHARE * largest.sum())
        rows.append(ObedienceRow("far_click", case.dataset, case.case, 0, not returned))
    return rows


def own_is_best(predicted: np.ndarray, truths: np.ndarray, own: int) -> bool:
    """Whether a mask bool [H, W] overlaps `truths[own]` more than any other of bool [N, H, W]."""
    overlap = (truths & predicted).sum((1, 2)) / np.maximum((truths | predicted).sum((1, 2)), 1)
    return bool(overlap[own] > 0 and overlap[own] > np.delete(overlap, own).max(initial=0.0))


def far_point(truths: np.ndarray) -> tuple[float, float] | None:
    """(x, y) of the pixel farthest from all of bool [N, H, W]; None where objects fill the frame."""
    free = ~truths.any(0)
    if not free.any():
        return None
    distance = ndimage.distance_transform_edt(free)
    y, x = np.unravel_index(int(np.argmax(distance)), distance.shape)
    return float(x), float(y)


# ---------------------------------------------------------------------------------------------------- the start


def start_scores(
    trainer: L.Trainer, settings: TrainSettings, measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """What the starting model scores, by "val/..._start": measured at the first step, then read from the run folder.

    Every rank must call it. Random weights know nothing: they are not measured. A run that is resumed without the
    file (one of an earlier version) goes on without these figures.
    """
    path = Path(settings.output) / START_SCORES
    known = trainer.strategy.broadcast(_read(path) if trainer.is_global_zero else None)
    if known is None and trainer.global_step == 0 and settings.start != "random":
        known = {key + START: value for key, value in measure().items() if key in KEPT}
        _write(path, known)
    return dict(known or {})


def _read(path: Path) -> dict[str, float] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@rank_zero_only
def _write(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode("utf-8"))


def with_tradeoff(values: dict[str, float], start: dict[str, float], settings: ValidationSettings) -> dict[str, float]:
    """`values` with the start's beside them, and `val/tradeoff` where it is asked for."""
    beside = {key: value for key, value in start.items() if key.removesuffix(START) in values}
    found = {**values, **beside}
    if settings.tradeoff is not None:
        found[TRADEOFF] = tradeoff(found, settings.tradeoff)
    return found


# ---------------------------------------------------------------------------------------------------- callbacks


def keep_callbacks(settings: TrainSettings) -> list[Callback]:
    """Early stopping and interpolation, where they are asked for."""
    found: list[Callback] = []
    validation = settings.validation
    if validation.patience is not None and (validation.cases or validation.clips):
        monitor, mode = best_monitor(validation.tradeoff, validation.cases)
        found.append(EarlyStopping(monitor, patience=validation.patience, mode=mode, check_finite=False))
    if settings.keep.interpolate:
        found.append(InterpolateAtEnd(settings))
    return found


class InterpolateAtEnd(Callback):
    """Scores weights between start and end once training is over, and keeps the best.

    Writes `interpolation.json` (one row a share, the end among them) and `checkpoints/interpolated.ckpt`, which holds
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
        shares = sorted({*self.settings.keep.interpolate, 1.0})
        scratch = Tracker(build_sam(pl_module.spec).to(pl_module.device)).eval()
        rows = []
        for share in shares:
            scratch.sam.load_state_dict(interpolate(start, end, share))
            values = probe_all(scratch, cases, self.settings.validation)
            rows.append({"share": share, **with_tradeoff(values, pl_module.start_scores, self.settings.validation)})
        best = best_share(rows, best_monitor(self.settings.validation.tradeoff, 1)[0])
        _write(folder / INTERPOLATION, {"best": best, "shares": rows})
        # The official state has the adapter merged in.
        update = {"adapter": None, "step": int(trainer.global_step), "interpolated": best}
        provenance = pl_module.provenance.model_copy(update=update).to_dict()
        self.save(folder / "checkpoints" / "interpolated.ckpt", interpolate(start, end, best), provenance)

    @rank_zero_only
    def save(self, path: Path, state: dict[str, Tensor], said: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            weights = {LIGHTNING_PREFIX + name: value.cpu() for name, value in state.items()}
            torch.save({"state_dict": weights, "medsam2": said}, file)


def best_share(rows: Sequence[dict[str, float]], monitor: str) -> float:
    """The share with the highest `monitor`; of equals the one nearest to the start."""
    return float(max(rows, key=lambda row: (row[monitor], -row["share"]))["share"])
