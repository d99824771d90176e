"""The first phase of pretraining from random weights: learn to read prompts, without any image.

Trained jointly on images and prompts, small models from random weights do not learn to use the prompt; after a few
hundred steps on targets that are drawn from the prompt itself they do. The mask decoder sees noise instead of an
image; a box asks for its inscribed ellipse, a click for a disk of fixed radius, a mask for itself.

Legend: N prompts, S input side, h and w the embedding's sides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from medsam2.data.read.reader import StepSampler
from medsam2.model.losses import clip_loss
from medsam2.model.memory_bank import MemoryBank
from medsam2.model.tracker import Features, TrackedFrame
from medsam2.prompts.randomness import Draws, RandomStream, normal, uniform
from medsam2.prompts.simulate import PromptPlan, dense_prompts, initial_prompts
from medsam2.training.module import FineTuner

NOISE = 0.02
DISK_RADIUS = 0.11
KINDS = ("box", "click", "dense")


class PromptsFirst(FineTuner):
    """Trains prompt encoder and mask decoder on shapes that follow from the prompt, the three kinds in turn."""

    needs_data = False
    prompts_per_step = 128

    def train_dataloader(self) -> DataLoader[int]:
        """The numbers of the steps: this phase has no data but its seed."""
        steps = range(self.settings.trainer.max_steps)
        sampler = StepSampler(len(steps), lambda: int(self.trainer.global_step))
        return DataLoader(steps, batch_size=None, sampler=sampler)  # type: ignore[arg-type]  # a range is a data set

    def training_step(self, batch: int, batch_idx: int) -> Tensor:  # type: ignore[override]  # a step's number
        kind = KINDS[batch % len(KINDS)]
        seeds = torch.arange(self.prompts_per_step, device=self.device)
        seeds = seeds + int(Draws(self.settings.seed, batch).number() * 2**40)
        masks = self.draw(kind, seeds)
        prompts, previous = (
            dense_prompts(masks, self.tracker.sam.sam_prompt_encoder.mask_input_size, seeds, 0)
            if kind == "dense"
            else (initial_prompts(masks, kind, seeds, 0, self.settings.prompts), None)
        )
        decoded = self.tracker.segment(self.blank(seeds), MemoryBank(), 0, prompts, previous, initial=True)
        tracked = [TrackedFrame(0, (decoded,), conditioning=True)]
        losses = clip_loss(tracked, masks[:, None], self.settings.loss, self.objects_per_rank(masks))
        self.log_step(losses, PromptPlan(kind, (0,), (), 0), torch.ones(()))
        return losses.total

    def blank(self, seeds: Tensor) -> Features:
        """Noise where an image's embedding would be, zeros for the high-resolution features."""
        sam, side = self.tracker.sam, self.tracker.sam.sam_image_embedding_size
        width, count = sam.hidden_dim, len(seeds)
        noise = normal(seeds, RandomStream.EMBEDDING_NOISE, width * side * side) * NOISE
        noise = noise.reshape(count, width, side, side)
        high_res = (
            noise.new_zeros(count, width // 8, 4 * side, 4 * side),
            noise.new_zeros(count, width // 4, 2 * side, 2 * side),
        )
        return Features(noise, noise.new_zeros(1, width, side, side), high_res)

    def draw(self, kind: str, seeds: Tensor) -> Tensor:
        """Target masks bool [N, S, S]: ellipses for boxes, disks of one radius for clicks, pairs of both for masks."""
        size = self.tracker.image_size
        numbers = uniform(seeds, RandomStream.TARGET_SHAPE, 10)
        first = self._ellipse(numbers[:, :5], size)
        if kind == "click":
            disk = numbers[:, :5].clone()
            disk[:, 2:4] = DISK_RADIUS
            return self._ellipse(disk, size, radius=True)
        return first | self._ellipse(numbers[:, 5:], size) if kind == "dense" else first

    @staticmethod
    def _ellipse(numbers: Tensor, size: int, radius: bool = False) -> Tensor:
        """Axis-parallel ellipses inside the image from numbers in [0, 1): centre x, y, semi-axes, unused."""
        grid = torch.arange(size, device=numbers.device, dtype=torch.float32) + 0.5
        axes = numbers[:, 2:4] * size if radius else size * 0.5 * 0.08 * (1 / 0.08) ** (numbers[:, 2:4] * 0.95)
        centre = axes + numbers[:, :2] * (size - 2 * axes)
        x = ((grid[None] - centre[:, :1]) / axes[:, :1]) ** 2
        y = ((grid[None] - centre[:, 1:]) / axes[:, 1:]) ** 2
        return (y[:, :, None] + x[:, None, :]) <= 1
