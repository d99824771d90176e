from __future__ import annotations

from pathlib import Path

import pytest

from medsam2.cases.settings import SettingsBook, check_window, read_settings
from medsam2.errors import UserError


def book(tmp_path: Path, text: str, **flags: object) -> SettingsBook:
    path = tmp_path / "prepare.yaml"
    path.write_text(text)
    return read_settings(path, flags)


def test_a_data_set_overrides_what_holds_for_all_and_a_pattern_stands_for_several(tmp_path: Path):
    all_settings = book(
        tmp_path,
        """
window: lung
labels: {drop: [table]}
datasets:
  Dataset007: {window: [-100, 200], labels: {rename: {cancer: tumour}}, licence: CC-BY-4.0}
  "echo_*": {modality: US, axis: z}
""",
        min_pixels=3,
    )
    seven = all_settings.of("Dataset007")
    assert seven.window == (-100, 200) and seven.licence == "CC-BY-4.0" and seven.min_pixels == 3
    assert seven.labels.rename == {"cancer": "tumour"} and seven.labels.drop == ("table",)
    assert all_settings.of("echo_4").modality == "US" and all_settings.of("echo_4").window == "lung"
    assert all_settings.of("other").window == "lung"


def test_a_window_in_numbers_for_all_holds_for_ct_alone(tmp_path: Path):
    all_settings = book(tmp_path, "datasets: {mine: {window: [0, 900]}}", window="-160:240")
    assert all_settings.of("any", "CT").window == (-160, 240)
    assert all_settings.of("any", "MR").window is None
    assert all_settings.of("mine", "MR").window == (0, 900)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("windo: abdomen", "unknown key 'windo'.* Did you mean 'window'"),
        ("labels: {renam: {a: b}}", "unknown key 'labels.renam'.* Did you mean 'rename'"),
        ("datasets: {a: {axi: z}}", "datasets.a: unknown key 'axi'"),
        ("window: abdomn", "Did you mean 'abdomen'"),
        ("window: [300, 100]", "lower bound"),
        ("modality: CTX", "Did you mean 'CT'"),
        ("patient: '(a'", "not a regular expression"),
        ("patient: 'a+'", "needs a group"),
        ("percentiles: [99, 1]", "ascending"),
        ("min_voxels: 0", "min_voxels"),
        ("{window: lung, windows: [lung, bone]}", "not both"),
        ("- 1", "expected keys"),
        ("a: [", "not readable as yaml"),
        ("datasets: [a]", "datasets"),
    ],
)
def test_a_mistake_is_named_with_its_key(tmp_path: Path, text: str, match: str):
    with pytest.raises(UserError, match=match):
        book(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.yaml: no such file"):
        read_settings(tmp_path / "gone.yaml")


def test_flags_are_named_by_their_setting():
    with pytest.raises(UserError, match="^--min-voxels=0: "):
        read_settings(None, {"min_voxels": 0})
    with pytest.raises(UserError) as caught:
        read_settings(None, {"min_voxels": 0, "axis": "w"})
    assert [line.strip().partition("=")[0] for line in str(caught.value).splitlines()] == ["--axis", "--min-voxels"]


def test_the_patient_is_found_in_the_name_of_a_case(tmp_path: Path):
    settings = book(tmp_path, "patient: '^(?P<patient>[^_]+)_'").common
    assert settings.patient_of("p12_scan3") == "p12"
    assert settings.patient_of("noseparator") is None


@pytest.mark.parametrize("value", ["-160:240", [-160, 240], (-160.0, 240.0)])
def test_windows_are_read_from_text_and_lists(value: object):
    assert check_window(value) == (-160.0, 240.0)
