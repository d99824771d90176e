"""Parameter groups and the learning-rate schedule.

Layer-wise decay over the trunk, a rate of its own for the image encoder, and no weight decay on norms and biases
are those of SAM 2's and MedSAM2's training (arXiv 2408.00714, 2504.03600).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from medsam2.model.adaptation import module_of


class OptimSettings(BaseModel):
    """AdamW and a cosine schedule.

    Attributes:
        lr: base rate. module_lr: factor on `lr` by module name (image_encoder: 0.6 is MedSAM2's 3e-5 over 5e-5).
        layer_decay: factor for each block of the trunk from the last to the first (1 = none).
        weight_decay: of matrices; biases, norms, embeddings have none.
        warmup_steps: linear from 0. final_lr: share of the rate at the end of the cosine.
        clip: global gradient norm, None for none (Lightning clips).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(5e-5, gt=0)
    module_lr: dict[str, float] = Field(default_factory=dict)
    layer_decay: float = Field(1.0, gt=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = Field(0, ge=0)
    final_lr: float = Field(0.1, ge=0, le=1)
    clip: float | None = Field(0.1, gt=0)


@dataclass(frozen=True)
class GroupKey:
    """What parameters of one optimiser group share."""

    module: str
    rate: float
    decay: float


def parameter_groups(sam: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Groups for AdamW: one for each module, rate and decay among the trained parameters of `sam`."""
    blocks = sum(1 for name, _ in sam.named_modules() if re.fullmatch(r"image_encoder\.trunk\.blocks\.\d+", name))
    groups: dict[GroupKey, list[nn.Parameter]] = {}
    for name, parameter in sam.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(_group_of(name, parameter, blocks, settings), []).append(parameter)
    return [
        {"params": parameters, "lr": key.rate, "weight_decay": key.decay, "name": f"{key.module}/{index}"}
        for index, (key, parameters) in enumerate(groups.items())
    ]


def _group_of(name: str, parameter: nn.Parameter, blocks: int, settings: OptimSettings) -> GroupKey:
    module = module_of(name)
    rate = settings.lr * settings.module_lr.get(module, 1.0)
    if module == "image_encoder" and settings.layer_decay < 1:
        found = re.search(r"trunk\.blocks\.(\d+)\.", name)
        depth = int(found.group(1)) + 1 if found else (0 if "trunk." in name else blocks + 1)
        rate *= settings.layer_decay ** (blocks + 1 - depth)
    no_decay = parameter.ndim <= 1 or name.endswith(("bias", "pos_embed", "pos_embed_window", "_embed", "_enc"))
    return GroupKey(module, rate, 0.0 if no_decay else settings.weight_decay)


def make_optimizer(sam: nn.Module, settings: OptimSettings, max_steps: int) -> tuple[AdamW, LambdaLR]:
    """AdamW over `parameter_groups` and its step-wise schedule."""
    optimizer = AdamW(parameter_groups(sam, settings), lr=settings.lr, betas=settings.betas)
    return optimizer, LambdaLR(optimizer, lambda step: rate_at(step, max_steps, settings))


def rate_at(step: int, max_steps: int, settings: OptimSettings) -> float:
    """Factor on the rate at `step`: linear warm-up, then a cosine from 1 to `final_lr`.

    >>> round(rate_at(100, 100, OptimSettings(final_lr=0.1)), 3)
    0.1
    """
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    share = min((step - settings.warmup_steps) / max(max_steps - settings.warmup_steps, 1), 1.0)
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * share))
