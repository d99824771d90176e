"""Losses against an independent NumPy computation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from medsam2.model.losses import LossSettings, clip_loss
from medsam2.model.tracker import Decoded, TrackedFrame

SIDE = 16


def decoded(seed: int, objects: int, candidates: int) -> Decoded:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(objects, candidates, SIDE, SIDE, generator=generator) * 3
    return Decoded(
        all_logits=logits.requires_grad_(),
        ious=torch.rand(objects, candidates, generator=generator),
        logits=logits[:, :1],
        object_score=torch.randn(objects, 1, generator=generator),
        pointer=torch.zeros(objects, 4),
    )


def numpy_terms(step: Decoded, truth: np.ndarray) -> np.ndarray:
    """[focal, dice, iou, presence] of one step, written from the paper's formulas, object by object."""
    logits, total = step.all_logits.detach().double().numpy(), np.zeros(4)
    for n in range(len(logits)):
        target = truth[n].astype(float)
        present = float(target.any())
        score = float(step.object_score[n, 0])
        total[3] += np.log1p(np.exp(-score)) if present else np.log1p(np.exp(score))
        rows = []
        for k in range(logits.shape[1]):
            p = 1 / (1 + np.exp(-logits[n, k]))
            pt = np.where(target == 1, p, 1 - p)
            alpha = np.where(target == 1, 0.25, 0.75)
            focal = (-alpha * (1 - pt) ** 2 * np.log(pt)).mean()
            dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
            hard = logits[n, k] > 0
            iou = (hard & (target == 1)).sum() / max((hard | (target == 1)).sum(), 1)
            rows.append((focal, dice, abs(float(step.ious[n, k]) - iou)))
        best = min(rows, key=lambda row: 20 * row[0] + row[1])
        total[:3] += present * np.array([best[0], best[1], np.mean([row[2] for row in rows])])
    return total


def test_losses_equal_numpy() -> None:
    objects = 5
    truth = torch.rand(objects, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9)) > 0.6
    truth[1, 2] = False
    frames = [
        TrackedFrame(0, (decoded(1, objects, 3), decoded(2, objects, 1)), True),
        TrackedFrame(2, (decoded(3, objects, 3),), False),
    ]
    expected = np.zeros(4)
    for frame in frames:
        for step in frame.steps:
            expected += numpy_terms(step, truth[:, frame.frame].numpy())
    expected /= objects
    losses = clip_loss(frames, truth, LossSettings(), torch.tensor(float(objects)))
    assert np.allclose([losses.focal, losses.dice, losses.iou, losses.presence], expected, rtol=1e-5)
    weights = np.array([20, 1, 1, 1])
    assert np.isclose(float(losses.total.detach()), float(weights @ expected), rtol=1e-5)


def enlarged(values: np.ndarray, side: int) -> np.ndarray:
    """Bilinear between the centres of cells, the outermost held beyond them: [..., s, s] -> [..., side, side]."""
    small = values.shape[-1]
    centres = np.clip((np.arange(side) + 0.5) * small / side - 0.5, 0, small - 1)
    lower = np.minimum(centres.astype(int), small - 2)
    weights = np.zeros((side, small))
    weights[np.arange(side), lower] = 1 - (centres - lower)
    weights[np.arange(side), lower + 1] += centres - lower
    return weights @ values @ weights.T


def test_low_resolution_logits_are_compared_at_the_masks_own_resolution() -> None:
    objects, large = 3, 4 * SIDE
    truth = torch.rand(objects, 1, large, large, generator=torch.Generator().manual_seed(3)) > 0.5
    step = decoded(4, objects, 3)
    full = replace(step, all_logits=torch.from_numpy(enlarged(step.all_logits.detach().double().numpy(), large)))
    expected = numpy_terms(full, truth[:, 0].numpy()) / objects
    for recompute in (True, False):
        settings = LossSettings(recompute=recompute)
        losses = clip_loss([TrackedFrame(0, (step,), True)], truth, settings, torch.tensor(float(objects)))
        assert np.allclose([losses.focal, losses.dice, losses.iou, losses.presence], expected, rtol=1e-5)


def test_recomputing_gives_the_same_gradients() -> None:
    truth = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(2)) > 0.5
    gradients = []
    for recompute in (False, True):
        step = decoded(5, 4, 3)
        frames = [TrackedFrame(0, (step,), True)]
        clip_loss(frames, truth, LossSettings(recompute=recompute), torch.tensor(4.0)).total.backward()
        gradients.append(step.all_logits.grad)
    assert torch.equal(*gradients)


def test_only_the_best_candidate_is_trained() -> None:
    truth = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) > 0.5
    step = decoded(6, 1, 3)
    clip_loss([TrackedFrame(0, (step,), True)], truth, LossSettings(), torch.tensor(1.0)).total.backward()
    assert step.all_logits.grad is not None
    assert (step.all_logits.grad.abs().sum((2, 3)) > 0).sum() == 1


def test_an_absent_object_trains_its_presence_alone() -> None:
    truth = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
    step = decoded(7, 2, 1)
    losses = clip_loss([TrackedFrame(0, (step,), False)], truth, LossSettings(), torch.tensor(2.0))
    assert float(losses.focal) == float(losses.dice) == float(losses.iou) == 0
    assert float(losses.presence) > 0


def test_a_mask_prompt_that_is_the_output_adds_no_loss() -> None:
    truth = torch.ones(2, 1, SIDE, SIDE, dtype=torch.bool)
    output = decoded(8, 2, 1)
    step = Decoded(output.all_logits, output.ious, output.logits, output.object_score, output.pointer,
                   given_mask=torch.zeros(2, 1, SIDE, SIDE))  # fmt: skip
    assert float(clip_loss([TrackedFrame(0, (step,), True)], truth, LossSettings(), torch.tensor(2.0)).total) == 0


def test_fallback_candidates_are_trained_only_when_asked() -> None:
    truth = torch.rand(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) > 0.5
    for weight in (0.0, 0.5):
        step, other = decoded(6, 2, 1), decoded(7, 2, 3)
        step = replace(step, fallback=(other.all_logits, other.ious))
        settings = LossSettings(fallback=weight)
        clip_loss([TrackedFrame(0, (step,), True)], truth, settings, torch.tensor(2.0)).total.backward()
        assert (other.all_logits.grad is not None) == (weight > 0)
