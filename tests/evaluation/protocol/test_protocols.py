"""A protocol is data: each yaml composes, and its prompts are what it says."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medsam2.cases.case import Label
from medsam2.config import compose, configs_dir, validate
from medsam2.errors import UserError
from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.evaluation.protocol.protocols import Scene, Target, apply, scored_frames, why_outside
from medsam2.evaluation.settings import Corrections, EvaluateSettings, ProtocolSettings, protocol_names
from medsam2.model.build import load_model
from medsam2.model.provenance import Provenance
from medsam2.prompts.settings import PromptSettings

NAMES = ["custom", *protocol_names()]
REQUIRED = ["checkpoint=nano", "data.source=x", "output=y"]


def _mask() -> np.ndarray:
    mask = np.zeros((9, 30, 30), bool)
    mask[3, 10:14, 10:14] = True
    mask[4, 8:18, 9:16] = True
    mask[4, 22:25, 22:25] = True
    mask[5, 10:12, 10:12] = True
    return mask


def _settings(**options: Any) -> ProtocolSettings:
    return ProtocolSettings(name="p", **options)


@lru_cache
def _protocol(name: str) -> ProtocolSettings:
    return validate(EvaluateSettings, compose("evaluate", [*REQUIRED, f"protocol={name}"])).protocol


@pytest.mark.parametrize("name", NAMES)
def test_every_protocol_composes_prompts_and_cites(name: str) -> None:
    protocol = _protocol(name)
    assert protocol.name == name and protocol.citation
    parts = apply(protocol, Target(_mask(), number=2))
    assert [{prompt.object for prompt in part} for part in parts] == [{number} for number in range(len(parts))]
    assert all(3 <= prompt.frame <= 5 for part in parts for prompt in part)


def test_every_key_stands_in_the_custom_protocol_with_its_default() -> None:
    assert _protocol("custom") == ProtocolSettings(name="custom", citation=_protocol("custom").citation)
    text = (configs_dir() / "protocol" / "custom.yaml").read_text()
    assert all(f"\n{key}: " in text or f"\n{key}:  " in text for key in set(ProtocolSettings.model_fields) - {"name"})


def test_the_guide_lists_every_protocol_with_its_paper() -> None:
    lines = (Path(__file__).parents[3] / "docs" / "reference" / "protocols.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    for name in NAMES:
        assert any(f"`{name}`" in row for row in rows), f"docs/reference/protocols.md has no row for {name}"


@pytest.mark.parametrize("name", [name for name in NAMES if "_" in name and not name.startswith("ma_2024")])
def test_a_protocol_does_what_its_name_says(name: str) -> None:
    protocol, words = _protocol(name), name.split("_")
    frames = {word for word in words if word in ("first", "last", "middle", "largest", "spread", "caudal", "cranial")}
    if words[-1] == "first":  # of candidates
        assert protocol.candidate == "first"
        frames -= {"first"} if "first" not in words[:-1] else set()
    assert not frames or protocol.slices in frames
    for word, direction in (("forward", "forward"), ("both", "both"), ("front", "front_to_end")):
        assert word not in words or protocol.direction.startswith(direction)
    assert "mask" not in words or protocol.prompt == "mask"


def test_the_largest_slice_gets_a_tight_box() -> None:
    (((prompt),),) = apply(_settings(slices="largest", prompt="box"), Target(_mask()))
    assert prompt.frame == 4 and prompt.box == (9.0, 8.0, 24.0, 24.0)


def test_a_mask_prompt_is_the_truth_of_that_slice() -> None:
    ((prompt,),) = apply(_settings(slices="first", prompt="mask"), Target(_mask()))
    assert prompt.frame == 3 and prompt.mask is not None and np.array_equal(prompt.mask, _mask()[3])


def test_boxes_of_two_slices_are_parts_of_their_own_and_points_are_one_part() -> None:
    parts = apply(_settings(slices="every", prompt="boxes"), Target(_mask()))
    assert [[(prompt.frame, prompt.object) for prompt in part] for part in parts] == [
        [(3, 0)], [(4, 1)], [(4, 2)], [(5, 3)],
    ]  # fmt: skip
    (part,) = apply(_settings(slices="every", prompt="clicks"), Target(_mask()))
    assert [(prompt.frame, prompt.object) for prompt in part] == [(3, 0), (4, 0), (5, 0)]


def test_drawn_points_differ_between_objects_and_seeds_and_not_between_runs() -> None:
    def points(number: int, seed: int) -> list[list[float]]:
        ((prompt,),) = apply(_settings(prompt="scattered", number=5, seed=seed), Target(_mask(), number=number))
        assert prompt.points is not None
        return prompt.points.tolist()

    assert points(0, 0) == points(0, 0)
    assert points(0, 0) != points(1, 0) and points(0, 0) != points(0, 1)


# ------------------------------------------------------------------------------------------------ several objects


def _scene() -> Scene:
    """Two tools: the first on frames 0, 1 and 4, the second from frame 2 on."""
    planes = np.zeros((1, 6, 20, 20), np.uint8)
    planes[0, [0, 1, 4], 2:7, 2:7] = 1
    planes[0, 2:, 11:16, 10:15] = 2
    objects = (Label(1, "scissors"), Label(2, "hook"))
    frames = torch.zeros(6, 1, 20, 20, dtype=torch.uint8)
    return Scene(LoadedCase(frames, planes, objects, (1, 1, 1), "clip", "ENDOSCOPY", "d", "c", "p"))


def _frames(protocol: ProtocolSettings, number: int) -> list[int]:
    scene = _scene()
    (part,) = apply(protocol, scene.targets[number])
    return [prompt.frame for prompt in part]


def test_a_tool_is_prompted_again_when_it_comes_back_and_when_another_enters() -> None:
    assert _frames(_settings(slices="enters"), 0) == [0, 4] and _frames(_settings(slices="enters"), 1) == [2]
    assert _frames(_settings(slices="any_enters"), 0) == [0, 4] and _frames(_settings(slices="any_enters"), 1) == [2, 4]


def test_the_other_tools_click_is_a_negative_where_it_is_in_view() -> None:
    scene = _scene()
    protocol = _settings(slices="enters", prompt="click", negatives=8, negatives_from="others")
    (part,) = apply(protocol, scene.targets[0])
    assert [prompt.points.tolist() for prompt in part] == [[[4, 4]], [[4, 4], [12, 13]]]  # type: ignore[union-attr]
    assert [prompt.labels.tolist() for prompt in part] == [[1], [1, 0]]  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------- what is scored


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({"scored": "all"}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"scored": "present"}, [3, 4, 5]),
        ({"scored": "inner"}, [1, 2, 3, 4, 5, 6, 7]),
        ({"scored": "prompted", "direction": "alone"}, [4]),
    ],
)
def test_the_scored_frames_are_those_of_the_rule(options: dict[str, Any], frames: list[int]) -> None:
    assert scored_frames(_settings(**options), _mask().sum((1, 2)), (4,)).tolist() == frames


def test_a_still_and_a_clip_of_two_frames_are_scored_whole() -> None:
    for length in (1, 2):
        assert scored_frames(_settings(scored="inner"), np.full(length, 4), (0,)).tolist() == [0, 1][:length]


# ------------------------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("protocol=largest_box_bot", "Did you mean 'largest_box_both'"),
        ("protocol.slices=larges", "no such slice rule.*Did you mean 'largest'"),
        ("protocol.prompt=bx", "no such prompt rule.*Did you mean 'box'"),
        ("protocol.negatives_from=other", "Did you mean 'others'"),
        ("protocol.direction=forwards", "Did you mean 'forward'"),
        ("spilt=val", "Did you mean 'split'"),
        ("protocol.directoin=both", "Did you mean 'protocol.direction'"),
        ("protocol.corrections.msot=3", "Did you mean 'protocol.corrections.most'"),
    ],
)
def test_a_misspelt_override_names_the_closest_valid_one(override: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        validate(EvaluateSettings, compose("evaluate", [*REQUIRED, override]))


def test_any_rule_is_a_free_combination_on_the_command_line() -> None:
    overrides = [
        "protocol=custom",
        "protocol.name=mine",
        "protocol.slices=every",
        "protocol.step=4",
        "protocol.prompt=recist",
    ]
    config = compose(
        "evaluate", [*REQUIRED, *overrides, "protocol.corrections={most: 3, where: worst}", "protocol.negatives=1"]
    )
    protocol = validate(EvaluateSettings, config).protocol
    assert (protocol.name, protocol.step, protocol.prompt) == ("mine", 4, "recist")
    assert protocol.corrections == Corrections(most=3, where="worst")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "mask", "negatives": 1}, "a mask prompt has no points.*set negatives=0"),
        ({"prompt": "boxes", "corrections": {"most": 2}}, "set prompt=box or clicks"),
        ({"prompt": "mask", "corrections": {"most": 2}}, "set corrections.where=worst"),
        ({"direction": "alone", "corrections": {"most": 2, "where": "worst"}}, "set corrections.where=prompted"),
        ({"slices": "first", "step": 3}, "step needs slices=every"),
        ({"scored": "prompted", "direction": "both"}, "set direction=alone"),
    ],
)
def test_conflicting_options_are_refused_with_a_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(ProtocolSettings, {"name": "p", **options})


# ---------------------------------------------------------------------------------- what a model was trained with


def _provenance(**prompts: Any) -> Provenance:
    return Provenance(recipe={"prompts": PromptSettings(**prompts).model_dump(mode="json")})


BOXES = {"kinds": {"box": 1.0}, "corrections": 0}
POINTS = {"kinds": {"box": 1.0, "points": 0.5}, "corrections": 0}


@pytest.mark.parametrize(
    ("protocol", "prompts", "reason"),
    [
        (_settings(prompt="box"), BOXES, ""),
        (_settings(prompt="boxes"), BOXES, ""),
        (_settings(prompt="click"), BOXES, "prompts of the kind click"),
        (_settings(prompt="mask"), BOXES, "prompts of the kind mask"),
        (_settings(prompt="box", negatives=1), BOXES, "negative points"),
        (_settings(prompt="box", corrections=Corrections(most=1)), BOXES, "correction clicks"),
        (_settings(prompt="click", corrections=Corrections(most=1)), {}, ""),
        (_settings(prompt="recist"), {}, "prompts of the kind recist"),
        (_settings(prompt="recist"), {"kinds": {"recist": 1.0}}, ""),
        (_settings(prompt="box", negatives=1), POINTS, ""),
        (_settings(prompt="box", negatives=1), {**POINTS, "points": {"negatives": (0, 0)}}, "negative points"),
    ],
)
def test_a_prompt_that_the_model_was_not_trained_with_is_named(
    protocol: ProtocolSettings, prompts: dict[str, Any], reason: str
) -> None:
    why = why_outside(protocol, _provenance(**prompts))
    assert reason in why and bool(why) == bool(reason)


def test_a_checkpoint_without_training_settings_is_not_marked() -> None:
    assert not why_outside(_settings(prompt="recist"), Provenance())
    file_alone = Provenance(recipe={"file": "recipes/pretrain_nano"})
    assert not why_outside(_settings(prompt="recist"), file_alone)


def test_the_shipped_model_records_its_training_prompts() -> None:
    provenance = load_model("nano").provenance
    assert "trained with box, click, mask" in why_outside(_settings(prompt="recist"), provenance)
    assert not why_outside(_settings(prompt="box"), provenance)
