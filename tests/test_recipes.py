"""Every yaml in configs/ composes and is valid; the models, optimisers and modules that they name exist."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medsam2.config import compose, configs_dir, option_names, validate
from medsam2.evaluation.corruptions.registry import CORRUPTIONS
from medsam2.evaluation.settings import EvaluateSettings
from medsam2.model.build import ModelSpec, build_sam
from medsam2.model.policies import POLICIES, make_policy
from medsam2.training.fit import find_module
from medsam2.training.settings import TrainSettings

CONFIGS = configs_dir()
GIVEN = ["data.shards=shards", "output=run", "++start=nano"]
GROUPS = (
    "model",
    "adaptation",
    "prompts",
    "loss",
    "retention",
    "callbacks",
    "logger",
    "data",
    "augment",
    "optim",
    "trainer",
    "memory",
    "experiment",
    "debug",
)
EVALUATION_GROUPS = ("memory", "corruption")


def options(group: str) -> list[str]:
    return option_names(CONFIGS / group)


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in options(group)])
def test_training_option_composes_and_is_valid(choice: str) -> None:
    config = compose("train", [choice, *GIVEN])
    settings = validate(TrainSettings, config, choice)
    assert settings.data.shards == ("shards",)
    assert settings.memory.policy in POLICIES
    ModelSpec(settings.model.name, settings.model.version, settings.model.image_size)


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in EVALUATION_GROUPS for name in options(group)])
def test_evaluation_option_composes_and_is_valid(choice: str) -> None:
    config = compose("evaluate", [choice, "checkpoint=nano", "data.source=shards", "output=scores"])
    settings = validate(EvaluateSettings, config, choice)
    make_policy(settings.memory, build_sam(ModelSpec("hiera_nano")))
    assert set(settings.corruption.names) <= set(CORRUPTIONS)


def test_no_group_is_left_out() -> None:
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert folders == {*GROUPS, *EVALUATION_GROUPS, "protocol"}


@pytest.mark.parametrize("phase", ["prompts", "stills", "clips", "long_clips", "polish"])
def test_phase_of_the_pretraining_composes_and_is_valid(phase: str, tmp_path: Path) -> None:
    """`train.py --config-dir` puts the recipe's folder beside ours, as is done here by copying."""
    recipe = CONFIGS.parent / "recipes" / "pretrain_nano"
    assert phase in (recipe / "run.sh").read_text()
    shutil.copytree(CONFIGS, tmp_path / "configs")
    shutil.copytree(recipe / "experiment", tmp_path / "configs" / "experiment", dirs_exist_ok=True)
    config = compose("train", [f"experiment={phase}", *GIVEN], tmp_path / "configs")
    settings = validate(TrainSettings, config, phase)
    find_module(settings.module)
    assert settings.ema == 0.995 and settings.optim.clip == 1.0
