"""RECIST lines: the longest diameter against all pairs of pixels, ends on the object, points along it."""

from __future__ import annotations

import math

import numpy as np
import torch
from drawn_masks import random_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from torch import Tensor

from medsam2.prompts.initial import DIAMETER_DIRECTIONS, longest_diameter
from medsam2.prompts.kinds import PADDING
from medsam2.prompts.settings import PromptSettings, RecistSettings
from medsam2.prompts.simulate import initial_prompts


def simulate(masks: Tensor, recipe: PromptSettings, kind: str = "recist") -> tuple[Tensor, Tensor]:
    prompts = initial_prompts(masks, kind, torch.arange(len(masks)), 0, recipe)
    assert prompts.points is not None and prompts.labels is not None
    return prompts.points, prompts.labels


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_line_is_as_long_as_the_longest_of_all_pairs_and_ends_on_the_object(seed: int) -> None:
    masks = random_masks(seed)
    ends = longest_diameter(masks)
    for mask, line in zip(masks, ends, strict=True):
        pixels = np.argwhere(mask.numpy())
        longest = float(pdist(pixels).max()) if len(pixels) > 1 else 0.0
        length = float((line[1] - line[0]).norm())
        assert longest * math.cos(math.pi / (2 * DIAMETER_DIRECTIONS)) - 1e-3 <= length <= longest + 1e-3
        assert all(mask[y, x] for x, y in line.long().tolist())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.3))
def test_a_jittered_line_still_ends_on_the_object(seed: int, jitter: float) -> None:
    masks = random_masks(seed)
    points, labels = simulate(masks, PromptSettings(recist=RecistSettings(jitter=jitter)))
    assert (labels[:, :2] == 1).all()
    assert all(
        mask[y, x] for mask, line in zip(masks, points[:, :2], strict=True) for x, y in line.round().long().tolist()
    )


def test_the_middle_of_the_line_is_clicked() -> None:
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, 12:15, 4:29] = True
    points, labels = simulate(masks, PromptSettings())
    ends = points[0, :2]
    torch.testing.assert_close(points[0, 2], ends.mean(0))
    assert labels.tolist() == [[1] * 3]


def test_a_point_of_the_line_that_misses_a_bent_object_is_padding() -> None:
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, 4:28, 4:7] = True
    masks[0, 4:7, 4:28] = True
    _, labels = simulate(masks, PromptSettings())
    assert labels.tolist() == [[1, 1, PADDING]]


def test_the_square_around_the_line_has_its_length_and_its_middle() -> None:
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 30:33, 20:41] = True
    ends = longest_diameter(masks)[0]
    (corners,), _ = simulate(masks, PromptSettings(), "recist_box")
    length = float((ends[1] - ends[0]).norm())
    torch.testing.assert_close(corners[1] - corners[0], torch.full((2,), length))
    torch.testing.assert_close(corners.mean(0), ends.mean(0))
