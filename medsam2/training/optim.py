"""Parameter groups and the learning-rate schedule.

Layer-wise decay over the trunk (its position embeddings apart), a rate of its own for the image encoder, and no weight
decay on norms and biases are those of SAM 2's and MedSAM2's training (arXiv 2408.00714, 2504.03600).
"""

from __future__ import annotations

import math
import re
from itertools import product
from typing import Any

from pydantic import Field, field_validator
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from medsam2.adaptation.freeze import MODULES, module_of
from medsam2.adaptation.lora import adapter_names
from medsam2.data.settings import Strict
from medsam2.errors import check_choice

# One number for each output or input: their resting value is not 0, so decay would shrink the layer itself.
SCALES = ("lora_magnitude_vector", "ia3_l")


class OptimSettings(Strict):
    """AdamW and a cosine schedule.

    Attributes:
        lr: base rate. module_lr: factor on `lr` by module name (image_encoder: 0.6 is MedSAM2's 3e-5 over 5e-5).
        layer_decay: factor for each block of the trunk from the last to the first (1 = none); the rest of the image
            encoder keeps the full rate.
        adapter_lr: factor on `lr` for adapters (LoRA and its relatives), in the place of `module_lr`. They start at
            no effect and need about ten times the rate of full training; `layer_decay` leaves them alone.
        weight_decay: of matrices; biases, norms, scales and bare parameters (position and memory embeddings) have none.
        betas: of AdamW.
        warmup_steps: linear from 0. final_lr: share of the rate at the end of the cosine.
        clip: global gradient norm, None for none (Lightning clips).
    """

    lr: float = Field(5e-5, gt=0)
    module_lr: dict[str, float] = Field(default_factory=dict)
    layer_decay: float = Field(1.0, gt=0, le=1)
    adapter_lr: float = Field(10.0, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = Field(0, ge=0)
    final_lr: float = Field(0.1, ge=0, le=1)
    clip: float | None = Field(0.1, gt=0)

    @field_validator("module_lr")
    @classmethod
    def _names_modules(cls, value: dict[str, float]) -> dict[str, float]:
        for name, factor in value.items():
            check_choice("the module", name, (*MODULES, "other"))
            if not factor > 0:
                raise ValueError(f"{name}: {factor} is no rate; to freeze a module, name it in adaptation.freeze")
        return value


def parameter_groups(sam: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Groups for AdamW: one for each module, kind (weights or adapter), rate and decay among the trained parameters."""
    blocks = sum(1 for name, _ in sam.named_modules() if re.fullmatch(r"image_encoder\.trunk\.blocks\.\d+", name))
    adapters = adapter_names([name for name, _ in sam.named_parameters()])
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in sam.named_parameters():
        if parameter.requires_grad:
            key = _group_of(name, parameter, blocks, name in adapters, settings)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "name": f"{label}/{index}"}
        for index, ((label, rate, decay), parameters) in enumerate(groups.items())
    ]


def _group_of(
    name: str, parameter: nn.Parameter, blocks: int, adapter: bool, settings: OptimSettings
) -> tuple[str, float, float]:
    """(label, learning rate, weight decay) of the group of a parameter."""
    module = module_of(name)
    if adapter:
        label, rate = f"{module}_adapter", settings.lr * settings.adapter_lr
        matrix = parameter.ndim > 1 and not any(scale in name for scale in SCALES)
    else:
        label, rate = module, settings.lr * settings.module_lr.get(module, 1.0)
        rate *= settings.layer_decay ** _height(name, blocks)
        matrix = parameter.ndim > 1 and name.endswith(".weight")
    return label, rate, settings.weight_decay if matrix else 0.0


def _height(name: str, blocks: int) -> int:
    """How often `layer_decay` applies: 1 in the trunk's last block, `blocks` in the first, once more below it."""
    match = re.match(r"image_encoder\.trunk\.blocks\.(\d+)\.", name)
    if match:
        return blocks - int(match.group(1))
    # SAM 2's own training leaves the position embeddings out: they are added once, for all layers.
    return blocks + 1 if name.startswith("image_encoder.trunk.") and "pos_embed" not in name else 0


def make_optimizer(
    sam: nn.Module, settings: OptimSettings, max_steps: int, fused: bool = True
) -> tuple[AdamW, LambdaLR]:
    """AdamW over `parameter_groups` and its step-wise schedule.

    Args:
        fused: one pass over all weights, ten times faster on a CPU. Not with fp16 mixed precision: a fused optimiser
            takes the loss scale out of the gradients itself, after they should have been clipped.
    """
    optimizer = AdamW(parameter_groups(sam, settings), lr=settings.lr, betas=settings.betas, fused=fused)
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


# ------------------------------------------------------------------------------------------- the start-up table


HEADINGS = ("module", "parameters", "trained", "learning rate", "weight decay")


def training_table(sam: nn.Module, settings: OptimSettings) -> list[tuple[str, ...]]:
    """What is trained and how, as text under `HEADINGS`: a row for each module, and one for its adapter."""
    groups = {id(p): group for group in parameter_groups(sam, settings) for p in group["params"]}
    adapters = adapter_names([name for name, _ in sam.named_parameters()])
    parts: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in sam.named_parameters():
        parts.setdefault((module_of(name), name in adapters), []).append(parameter)
    rows: list[tuple[str, ...]] = []
    for module, is_adapter in product([*MODULES, "other"], (False, True)):
        parameters = parts.get((module, is_adapter), [])
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        count, rate, decay = "frozen", "", ""
        if trained:
            rates, decays = zip(*((groups[id(p)]["lr"], groups[id(p)]["weight_decay"]) for p in trained), strict=True)
            low, high = min(rates), max(rates)
            count = f"{sum(parameter.numel() for parameter in trained):,}"
            rate = f"{high:.3g}" if math.isclose(low, high) else f"{low:.3g} to {high:.3g}"
            decay = f"{max(decays):g}"
        if parameters:
            total = f"{sum(parameter.numel() for parameter in parameters):,}"
            rows.append(("  adapter" if is_adapter else module, total, count, rate, decay))
    return rows
