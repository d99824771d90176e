"""One step on each kind of batch, on one gloo rank or two: what gradients reach the optimiser.

    python tests/gradients.py FOLDER RANKS STRATEGY [CASE ...]

Writes `CASE-rank-R.safetensors` to FOLDER: the gradient of every parameter that has one. Two ranks take half of the
clips each; their clips have different numbers of objects. The optimiser moves nothing, so that all cases are of the
same weights.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from medsam2.adaptation.freeze import apply_adaptation
from medsam2.config import compose
from medsam2.data.augment.augment import AugmentedBatch
from medsam2.prompts.initial import INITIAL_KINDS
from medsam2.prompts.randomness import Draws
from medsam2.prompts.simulate import DENSE, PromptPlan
from medsam2.training.fit import quiet_lightning, starting_model
from medsam2.training.module import FineTuner
from medsam2.training.settings import TrainSettings

SIDE, FRAMES, CLIPS = 128, 2, 2
OBJECTS = (1, 3)  # of each clip: the first is that of rank 0


@dataclass(frozen=True)
class Kind:
    """What one step draws: the plan of its prompts, its frames, and whether a whole rank's objects end early."""

    plan: PromptPlan
    frames: int = FRAMES
    absent: bool = False


def kinds() -> dict[str, Kind]:
    """Every kind of initial prompt, and what else may leave parameters without a gradient."""
    plans = {name: PromptPlan(name, (0,), (), 0) for name in (*INITIAL_KINDS, DENSE)}
    found = {name: Kind(plan) for name, plan in plans.items()}
    found["box, corrected"] = Kind(PromptPlan("box", (0,), (0, 2), 2), frames=3)
    found["click, corrected"] = Kind(PromptPlan("click", (0, 1), (0, 1), 1))
    found["mask, two conditioning frames, from the middle"] = Kind(PromptPlan("mask", (1, 0), (), 0), frames=3)
    found["box, gone from all later frames of one rank"] = Kind(PromptPlan("box", (0,), (), 0), absent=True)
    found["box on a still"] = Kind(PromptPlan("box", (0,), (), 0), frames=1)
    return found


def batch(step: int, name: str, clips: range) -> AugmentedBatch:
    """The clips of one rank, which follow from the kind and the clip's number; noise with bright discs that move."""
    # Seeds for which no ReLU meets a zero: there a rounding error decides whether a whole unit has a gradient.
    kind, first = kinds()[name], 50 + 100 * list(kinds()).index(name)
    ys, xs = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    frames, masks, owners, seeds = [], [], [], []
    for clip in clips:
        random = torch.Generator().manual_seed(first + clip)
        pictures = torch.randn(kind.frames, 3, SIDE, SIDE, generator=random)
        for number in range(OBJECTS[clip]):
            x, y, dx, radius = (torch.rand(4, generator=random) * torch.tensor([60, 60, 12, 14])).tolist()
            disc = torch.stack(
                [(xs - 34 - x - dx * t) ** 2 + (ys - 34 - y) ** 2 < (8 + radius) ** 2 for t in range(kind.frames)]
            )
            if kind.absent and clip < CLIPS // 2:
                disc[1:] = False
            masks.append(disc)
            pictures += disc[:, None] * 1.5
            owners.append(clip - clips.start)
            seeds.append(10 * (first + clip) + number)
        frames.append(pictures)
    size = len(clips)
    return AugmentedBatch(
        torch.stack(frames), torch.stack(masks), torch.tensor(owners), torch.tensor(seeds),
        torch.tensor([first + clip for clip in clips]), step, ("disc",) * len(masks),
        tuple(f"clip {clip}" for clip in clips), ("d",) * size, ("CT",) * size, 0,
    )  # fmt: skip


class Observed(FineTuner):
    """Draws the plans of `kinds` in turn and writes the gradients that an optimiser would take."""

    needs_data = False
    folder: Path
    chosen: tuple[str, ...]

    def plan(self, draws: Draws, batch: AugmentedBatch) -> PromptPlan:
        return kinds()[self.chosen[batch.step]].plan

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # Lightning cannot move a frozen dataclass, and all is on the CPU

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        found: dict[str, Tensor] = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        assert all(math.isfinite(float(grad.sum())) for grad in found.values())
        name = self.chosen[self.trainer.global_step]
        save_file(
            {n: g.contiguous() for n, g in found.items()}, self.folder / f"{name}-rank-{self.global_rank}.safetensors"
        )


def settings() -> TrainSettings:
    # A correction drawn from the error would lie elsewhere where rounding flips a pixel at the error's border.
    given = (
        "experiment=quickstart", "start=random", "seed=3", "ema=null", "validation.cases=0", "prompts.from_truth=1",
        "data.shards=none", "output=none",
    )  # fmt: skip
    return TrainSettings.model_validate(compose("train", given))


def run(folder: Path, ranks: int, strategy: str, chosen: tuple[str, ...], clips: range | None = None) -> None:
    """A real Lightning run over the chosen kinds, one step each, on `clips` or on this rank's part of all of them."""
    quiet_lightning()
    own = settings()
    torch.manual_seed(0)
    loaded = starting_model(own)
    apply_adaptation(loaded.sam, own.adaptation)
    module = Observed(loaded, own)
    module.folder, module.chosen = folder, chosen
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=len(chosen), precision="32-true", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    size = CLIPS // ranks
    clips = clips or range(trainer.global_rank * size, (trainer.global_rank + 1) * size)
    batches = [batch(step, name, clips) for step, name in enumerate(chosen)]
    trainer.fit(module, DataLoader(batches, batch_size=None))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], tuple(sys.argv[4:] or kinds()))
