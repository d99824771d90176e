"""Which frames are prompted: every rule on areas that can be counted by hand."""

import numpy as np
import pytest

from medsam2.prompts.evaluation import SLICE_RULES, ObjectTrack, mark_entries, pick_frames, slice_rule

AREAS = [0, 2, 5, 9, 9, 3, 0, 1]  # shown on 1 to 5 and on 7
OTHER = [4, 4, 0, 0, 6, 6, 6, 6]  # another object comes into view on 0 and on 4


def _track(step: int = 1, areas: list[int] = AREAS) -> ObjectTrack:
    present = np.array([areas, OTHER[: len(areas)]]) > 0
    return ObjectTrack(np.array(areas), lambda: np.any([mark_entries(row) for row in present], axis=0), step)


EXPECTED = {
    "first": (1,),
    "last": (7,),
    "caudal": (1,),
    "cranial": (7,),
    "middle": (4,),
    "largest": (3,),
    "spread": (2, 3, 4),
    "both_ends": (1, 7),
    "every": (1, 2, 3, 4, 5, 7),
    "enters": (1, 7),
    "any_enters": (1, 4, 7),
}


@pytest.mark.parametrize("name", SLICE_RULES)
def test_every_rule_chooses_what_was_counted_by_hand(name: str) -> None:
    assert pick_frames(_track(), name) == EXPECTED[name]


def test_every_third_frame_is_counted_from_the_first_with_the_object() -> None:
    assert pick_frames(_track(step=3), "every") == (1, 4, 7)
    assert pick_frames(_track(step=5), "every") == (1,)  # frame 6 does not show it


@pytest.mark.parametrize("name", SLICE_RULES)
def test_an_object_on_one_frame_is_prompted_there_by_every_rule(name: str) -> None:
    assert pick_frames(_track(areas=[0, 0, 3, 0]), name) == (2,)


def test_an_object_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to prompt"):
        pick_frames(_track(areas=[0, 0]), "first")


def test_two_rules_of_one_name_are_refused() -> None:
    def first(track: ObjectTrack) -> np.ndarray:
        return track.frames

    with pytest.raises(RuntimeError, match="two slice rules are named 'first'"):
        slice_rule(first)
