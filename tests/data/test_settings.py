from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from medsam2.data.settings import AugmentSettings, DataSettings

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "augment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_augmentation_yaml_is_valid(path: Path) -> None:
    AugmentSettings.model_validate(yaml.safe_load(path.read_text()))


def test_the_yaml_of_the_data_group_has_every_key_with_its_default() -> None:
    content = yaml.safe_load((CONFIGS / "data" / "default.yaml").read_text())
    assert content.pop("shards") == "???"
    defaults = DataSettings(shards=("x",)).model_dump(mode="json", exclude={"shards"})
    assert content == defaults


def test_one_folder_or_several() -> None:
    assert DataSettings.model_validate({"shards": "a"}).shards == ("a",)
    assert DataSettings.model_validate({"shards": ["a", Path("b")]}).shards == ("a", "b")


def test_a_url_stays_as_it_is() -> None:
    assert DataSettings.model_validate({"shards": "s3://bucket/shards"}).shards == ("s3://bucket/shards",)


@pytest.mark.parametrize("values", [{"shards": []}, {"shards": "a", "clip_frame": 8}, {"shards": "a", "workers": -1}])
def test_wrong_settings_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataSettings.model_validate(values)


def test_a_range_must_be_in_order() -> None:
    with pytest.raises(ValidationError, match="low end above"):
        AugmentSettings.model_validate({"gamma": {"probability": 1, "range": [2, 1]}})
