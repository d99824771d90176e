"""Our training step on one clip, as one line of JSON. `train_step.py` runs it in a separate process."""

from __future__ import annotations

import train_work


def main() -> None:
    work = train_work.given()
    import torch

    from medsam2.adaptation.freeze import AdaptationSettings, apply_adaptation
    from medsam2.fast.execution import SpeedSettings, apply_speed
    from medsam2.model.build import ModelSpec, load_model
    from medsam2.model.losses import LossSettings, clip_loss
    from medsam2.model.rollout import rollout
    from medsam2.model.tracker import Tracker
    from medsam2.prompts.settings import PromptSettings
    from medsam2.prompts.simulate import PromptPlan
    from medsam2.training.optim import OptimSettings, make_optimizer

    idle = train_work.peak_mb()
    sam = load_model(work.weights, ModelSpec("hiera_tiny", image_size=work.side)).sam.to(work.device)
    apply_adaptation(sam, AdaptationSettings(freeze=(r"image_encoder\.",) if work.frozen else ()))
    tracker = Tracker(sam).train()
    apply_speed(tracker, SpeedSettings(attention_dropout=work.dropout, checkpoint=work.checkpoint))
    optimizer, _ = make_optimizer(sam, OptimSettings(lr=1e-6), 100)
    frames, masks = train_work.clip(work)
    owner = torch.zeros(work.objects, dtype=torch.int64, device=work.device)
    seeds = torch.arange(work.objects, device=work.device)
    plan = PromptPlan("click", (0,), tuple(work.corrected), train_work.CORRECTIONS)
    recipe, weights = PromptSettings(corrections=train_work.CORRECTIONS, from_truth=0.1), LossSettings()
    count = torch.tensor(float(work.objects), device=work.device)

    def loss() -> torch.Tensor:
        tracked = rollout(tracker, tracker.encode(frames), masks, owner, seeds, plan, recipe)
        return clip_loss(tracked, masks, weights, count).total

    train_work.measure(work, idle, loss, sam, optimizer)


if __name__ == "__main__":
    main()
