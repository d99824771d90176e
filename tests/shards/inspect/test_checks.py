from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from medsam2.shards.inspect.checks import CHECKS, by_kind, run_checks
from medsam2.shards.inspect.tables import CaseView, ObjectView

ORGAN = ObjectView("organ", frames=10, largest=900)
SOUND = CaseView(
    dataset="liver",
    split="val",
    case="0123456789abcdef",
    modality="CT",
    kind="volume",
    window="-160:240 HU",
    spacing=(3.0, 0.8, 0.8),
    shape=(20, 512, 512),
    segments=1,
    empty_segments=0,
    objects=(ORGAN, replace(ORGAN, name="lesion", largest=60)),
    histogram=(400, *range(40, 70), 20),
)


def findings(view: CaseView) -> list[tuple[str, str]]:
    return [(finding.kind, finding.what) for finding in run_checks([view])]


def only(view: CaseView, kind: str) -> str:
    """What the one finding about `view` says; it must be of `kind`."""
    ((actual, what),) = findings(view)
    assert actual == kind
    return what


def histogram(**counts: int) -> tuple[int, ...]:
    """32 bins; `b3=5` puts 5 in bin 3."""
    return tuple(counts.get(f"b{number}", 0) for number in range(32))


def test_a_sound_case_gives_no_warning():
    assert findings(SOUND) == []
    assert findings(replace(SOUND, histogram=())) == []


@pytest.mark.parametrize("objects", [(), (ObjectView("organ", 0, 0), ObjectView("lesion", 0, 0))])
def test_a_case_without_a_labelled_pixel_is_an_empty_mask(objects: Sequence[ObjectView]):
    assert only(replace(SOUND, objects=tuple(objects)), "empty masks") == "no object has a pixel"


def test_an_object_without_pixels_and_segments_without_objects_are_empty_masks():
    view = replace(SOUND, objects=(ORGAN, ObjectView("lesion", 0, 0)), segments=5, empty_segments=2)
    texts = [what for kind, what in findings(view) if kind == "empty masks"]
    assert texts == ["2 of 5 segments have no object", "1 of 2 objects (lesion) declared without a pixel"]


@pytest.mark.parametrize(
    ("counts", "share", "remedy"),
    [
        ({"b0": 985, "b9": 15}, "98.5 % of its pixels are in the darkest", "--window lung (-1350:150 HU)"),
        (
            {"b0": 600, "b20": 100, "b31": 300},
            "30 % of its pixels are in the brightest",
            "--window bone (-500:1300 HU)",
        ),
        ({"b3": 500, "b9": 499, "b20": 1}, "100 % of its pixels are in 3 of 32", "is a mask"),
    ],
)
def test_a_window_that_loses_the_image_is_named_with_a_better_one(counts: dict[str, int], share: str, remedy: str):
    (finding,) = run_checks([replace(SOUND, histogram=histogram(**counts))])
    assert finding.kind == "suspicious window"
    assert share in finding.what
    assert "with window -160:240 HU" in finding.what
    assert remedy in finding.remedy


def test_usual_air_and_usual_bone_are_no_suspicious_window():
    usual = {"b0": 800, "b8": 60, "b15": 60, "b20": 50, "b31": 30}
    assert findings(replace(SOUND, histogram=histogram(**usual))) == []


def test_no_window_in_hu_is_suggested_where_none_was_used():
    dark = histogram(b0=999, b5=1)
    (finding,) = run_checks([replace(SOUND, modality="MR", window="0:900 (percentiles 0.5-99.5)", histogram=dark)])
    assert "--window" not in finding.remedy
    (widest,) = run_checks([replace(SOUND, window="-9000:9000 HU", histogram=dark)])
    assert "Hounsfield" in widest.remedy


def test_objects_that_all_fill_the_frame_are_suspected_to_be_swapped():
    everywhere = replace(ORGAN, fills=True)
    assert "more than 90 %" in only(replace(SOUND, objects=(everywhere,)), "object fills the frame")
    assert findings(replace(SOUND, objects=(everywhere, replace(ORGAN, name="lesion")))) == []


@pytest.mark.parametrize(
    ("spacing", "text"),
    [
        ((3.0, 0.0008, 0.0008), "outside 0.05 to 20"),
        ((300.0, 80.0, 80.0), "outside 0.05 to 20"),
        ((0.0, 0.8, 0.8), "outside 0.05 to 20"),
        ((float("nan"), 0.8, 0.8), "outside 0.05 to 20"),
        ((10.0, 0.5, 0.5), "a ratio of 20 to 1"),
    ],
)
def test_spacing_that_no_scanner_gives_is_a_warning(spacing: tuple[float, float, float], text: str):
    assert text in only(replace(SOUND, spacing=spacing), "extreme spacing")


def test_seconds_of_a_clip_and_micrometres_of_a_microscope_are_no_extreme_spacing():
    assert findings(replace(SOUND, kind="clip", modality="US", spacing=(0.03, 0.4, 0.4))) == []
    assert findings(replace(SOUND, modality="MICROSCOPY", spacing=(0.001, 0.0003, 0.0003))) == []


def test_a_volume_of_one_slice_and_an_object_on_one_slice_are_warned_of():
    assert only(replace(SOUND, shape=(1, 512, 512)), "one slice") == "a volume of one slice"
    single = replace(ORGAN, name="lesion", frames=1)
    assert only(replace(SOUND, objects=(ORGAN, single)), "one slice") == "1 of 2 objects (lesion) on one slice only"
    assert findings(replace(SOUND, kind="still", shape=(1, 512, 512), objects=(single,))) == []


def test_objects_too_small_for_the_model_are_counted():
    tiny = replace(ORGAN, name="nodule", largest=19)
    assert "1 of 2 objects (nodule) below 20 px" in only(replace(SOUND, objects=(ORGAN, tiny)), "very small object")


def test_a_clip_shorter_than_a_training_clip_is_warned_of():
    clip = replace(SOUND, kind="clip", shape=(7, 512, 512))
    assert only(clip, "short clip") == "a clip of 7 frames"
    assert findings(replace(clip, shape=(8, 512, 512))) == []


def test_warnings_come_worst_kind_first_and_each_names_case_data_set_and_remedy():
    short = replace(SOUND, kind="clip", shape=(7, 512, 512))
    empty = replace(SOUND, objects=(), case="fedcba9876543210")
    findings = run_checks([short, empty])
    assert list(by_kind(findings)) == ["empty masks", "short clip"]
    assert str(findings[0]).startswith("empty masks: liver val, case fedcba9876543210: no object has a pixel; ")
    assert all(finding.remedy for finding in findings)
    assert list(CHECKS)[0] == "empty masks"
