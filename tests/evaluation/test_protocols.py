"""A protocol is data: each yaml composes, and its prompts are what it says."""

from __future__ import annotations

import numpy as np
import pytest

from medsam2.config import compose, configs_dir, validate
from medsam2.errors import UserError
from medsam2.evaluation.protocols import apply
from medsam2.evaluation.settings import EvaluateSettings, ProtocolSettings

NAMES = sorted(path.stem for path in (configs_dir() / "protocol").glob("*.yaml"))
GIVEN = ["checkpoint=nano", "data.source=x", "output=y"]


def _mask() -> np.ndarray:
    mask = np.zeros((9, 30, 30), bool)
    mask[3, 10:14, 10:14] = True
    mask[4, 8:18, 9:16] = True
    mask[4, 22:25, 22:25] = True
    mask[5, 10:12, 10:12] = True
    return mask


@pytest.mark.parametrize("name", NAMES)
def test_every_protocol_composes_prompts_and_cites(name: str) -> None:
    settings = validate(EvaluateSettings, compose("evaluate", [*GIVEN, f"protocol={name}"]))
    assert settings.protocol.name == name
    assert settings.protocol.citation
    prompts = apply(settings.protocol, _mask(), 2)
    assert prompts and all(prompt.object == 2 and 3 <= prompt.frame <= 5 for prompt in prompts)


def test_the_largest_slice_gets_a_tight_box() -> None:
    (prompt,) = apply(ProtocolSettings(name="p", slices="largest", prompt="box"), _mask())
    assert prompt.frame == 4 and prompt.box == (9.0, 8.0, 24.0, 24.0)


def test_a_click_is_in_the_largest_component_and_clicks_are_one_each() -> None:
    (one,) = apply(ProtocolSettings(name="p", prompt="click"), _mask())
    (three,) = apply(ProtocolSettings(name="p", prompt="clicks"), _mask())
    assert one.points is not None and one.points.shape == (1, 2) and 9 <= one.points[0, 0] < 16
    assert three.points is not None and three.points.shape == (2, 2) and three.labels is not None
    assert three.labels.tolist() == [1, 1]


def test_a_mask_prompt_is_the_truth_of_that_slice() -> None:
    (prompt,) = apply(ProtocolSettings(name="p", slices="first", prompt="mask"), _mask())
    assert prompt.frame == 3 and prompt.mask is not None and np.array_equal(prompt.mask, _mask()[3])


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("protocol=largest_box_bot", "Did you mean 'largest_box_both'"),
        ("protocol.slices=larges", "Did you mean 'largest'"),
        ("spilt=val", "Did you mean 'split'"),
        ("protocol.directoin=both", "Did you mean 'protocol.direction'"),
    ],
)
def test_a_misspelt_override_names_the_closest_valid_one(override: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        validate(EvaluateSettings, compose("evaluate", [*GIVEN, override]))
