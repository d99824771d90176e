"""Methods against forgetting in a fine-tuning; each is one line of configuration, and they combine freely.

Replay (old data in every batch), L2 towards the starting weights (L2-SP, Li et al. 2018, arXiv 1802.01483, decoupled
from the gradient as AdamW's decay is), distillation from the starting model (learning without forgetting, Li and
Hoiem 2016, arXiv 1606.09282), and interpolation of start and end (`callbacks/validation.py`,
`medsam2/adaptation/interpolate.py`). Adapters,
layer-wise rates and the moving average are set elsewhere (`adaptation`, `optim`, `ema`).

Legend: N objects, K candidate masks, h and w their sides.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import WeightAveraging
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from medsam2.adaptation.anchors import Anchors
from medsam2.adaptation.interpolate import check_shares
from medsam2.data.settings import DataSettings, Strict
from medsam2.errors import UserError
from medsam2.model.losses import LossSettings
from medsam2.model.tracker import Decoded, TrackedFrame


class RetentionSettings(Strict):
    """The `retention` group: methods against forgetting.

    Attributes:
        new, old: which datasets are learned, or which are old knowledge: globs over dataset names,
            "folder:dataset" or modalities, as in `data.mixture`. Give one of the two; the other is the rest.
        replay: share of the clips that come from old datasets, split evenly over the patterns.
        l2: each step moves a weight by this times its learning rate of the way back to its start, as `weight_decay`
            moves it towards 0.
        distillation: weight of the starting model's soft masks, beside the truth, in units of the loss.
        distil_on: "all" clips, or those of "old" datasets, where the starting model is right.
        interpolate: shares of the way from start to end that are scored at the end; the best becomes
            checkpoints/interpolated.ckpt.
    """

    new: tuple[str, ...] = ()
    old: tuple[str, ...] = ()
    replay: float | None = Field(None, gt=0, lt=1)
    l2: float = Field(0.0, ge=0)
    distillation: float = Field(0.0, ge=0)
    distil_on: Literal["all", "old"] = "all"
    interpolate: tuple[float, ...] = ()

    @field_validator("interpolate")
    @classmethod
    def _are_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return check_shares(value) if value else value

    @model_validator(mode="after")
    def _one_of_the_two(self) -> RetentionSettings:
        if self.new and self.old:
            raise ValueError("give retention.new or retention.old: all other datasets are then the other kind")
        return self

    @property
    def needs_start(self) -> bool:
        """Whether a copy of the trained parameters at the start must be held."""
        return bool(self.l2 or self.distillation or self.interpolate)

    def is_old(self, *texts: str) -> bool:
        """Whether a dataset is old by its name, "folder:dataset" and modality; False unless `old` or `new` is set."""
        patterns = self.old or self.new
        matches = any(fnmatch.fnmatchcase(text, pattern) for text in texts for pattern in patterns)
        return matches if self.old else bool(self.new) and not matches


def add_replay(data: DataSettings, retention: RetentionSettings) -> DataSettings:
    """Return `data` with the mixture that `retention.replay` asks for.

    Raises:
        UserError: a mixture is given too, or neither `old` nor `new` is set.
    """
    needs_old = {
        "distil_on=old": retention.distillation and retention.distil_on == "old",
        f"replay={retention.replay}": retention.replay is not None,
    }
    for setting, active in needs_old.items():
        if active and not (retention.old or retention.new):
            raise UserError(
                f"retention.{setting}: say which datasets are old (retention.old=[...]) or new (retention.new=[...])."
            )
    if retention.replay is None:
        return data
    if data.mixture:
        raise UserError(
            f"retention.replay={retention.replay:g} and data.mixture both say what batches are made of; leave one of "
            "them out."
        )
    old, new = retention.replay, 1 - retention.replay
    named, rest = (old, new) if retention.old else (new, old)
    patterns = retention.old or retention.new
    mixture = {pattern: named / len(patterns) for pattern in patterns} | {"*": rest}
    return data.model_copy(update={"mixture": mixture})


# ---------------------------------------------------------------------------------------------------- L2


def pull_after_steps(optimizer: Optimizer, sam: nn.Module, anchors: Anchors, l2: float) -> None:
    """After each step of `optimizer`, move every weight by `l2` times its rate of the way back to its start."""
    names = {id(parameter): name for name, parameter in sam.named_parameters()}

    def pull(stepped: Optimizer, *_: Any) -> None:
        rates = {names[id(p)]: float(g["lr"]) for g in stepped.param_groups for p in g["params"]}
        anchors.pull(sam, {name: l2 * rate for name, rate in rates.items()})

    optimizer.register_step_post_hook(pull)


# ---------------------------------------------------------------------------------------------------- distillation


def distillation_loss(
    tracked: Sequence[TrackedFrame],
    teacher: Sequence[TrackedFrame],
    settings: LossSettings,
    included: Tensor,
    normaliser: Tensor,
) -> Tensor:
    """Compute the distance of each frame's first decoding from the starting model's under the same prompts: scalar.

    Divergence of the masks from its soft masks (mean over pixels and candidates), L1 of the IoU head, divergence of
    the presence head, with the weights that `settings` gives the terms against the truth; summed over frames and the
    `included` objects, divided by `normaliser`. It is 0 where both agree.

    Args:
        included: bool [N], the objects that count.
    """
    total = torch.zeros((), device=included.device)
    for ours, theirs in zip(tracked, teacher, strict=True):
        first = ours.steps[0]
        if first.given_mask is None:
            total = total + (_distance(first, theirs.steps[0], settings) * included).sum()
    return total / normaliser.clamp(min=1)


def _distance(student: Decoded, teacher: Decoded, settings: LossSettings) -> Tensor:
    """[N] of one decoding."""
    pairs = [(student.all_logits, student.ious, teacher.all_logits, teacher.ious, 1.0)]
    if settings.fallback and student.fallback is not None and teacher.fallback is not None:
        pairs.append((*student.fallback, *teacher.fallback, settings.fallback))
    total = settings.presence * divergence(student.object_score, teacher.object_score).mean(1)
    for logits, ious, soft, soft_ious, weight in pairs:
        masks = divergence(logits, soft).flatten(1).mean(1)
        total = total + weight * (settings.focal * masks + settings.iou * (ious - soft_ious).abs().float().mean(1))
    return total


def divergence(logits: Tensor, soft: Tensor) -> Tensor:
    """Kullback-Leibler divergence of sigmoid(logits) from sigmoid(soft), each pixel alone; float32, same shape."""
    logits, soft = logits.float(), soft.detach().float()
    target = soft.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return cross - F.binary_cross_entropy_with_logits(soft, target, reduction="none")


def distilled_objects(object_to_clip: Tensor, datasets: Iterable[str], old: Collection[str] | None) -> Tensor:
    """Return bool [N]: the objects of clips of `old` datasets; all objects if `old` is None."""
    included = torch.tensor([old is None or dataset in old for dataset in datasets], device=object_to_clip.device)
    return included[object_to_clip]


# ---------------------------------------------------------------------------------------------------- moving average


class EmaAverage(WeightAveraging):
    """Exponential moving average of the weights, which leaves frozen ones alone to the last bit.

    Lightning's default computes decay * a + (1 - decay) * b, which drifts by rounding where a = b; a + (1 - decay) *
    (b - a) does not.

    Args:
        decay: share of the average that stays at each step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The average lives where the module is, which Lightning moves to the run's device only later."""
        pl_module.to(trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)
