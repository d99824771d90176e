"""The prompts that each rule makes for an object on a frame, on masks small enough to draw."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsam2.prompts.evaluation import NEGATIVE_RULES, PROMPT_RULES, ObjectPrompt, ObjectView


def _two_parts() -> np.ndarray:
    """A square of 7 around (7, 6) and one of 3 around (24, 20)."""
    mask = np.zeros((28, 34), bool)
    mask[3:10, 4:11] = True
    mask[19:22, 23:26] = True
    return mask


def _make(name: str, mask: np.ndarray, **more: int) -> list[ObjectPrompt]:
    return PROMPT_RULES[name].make(ObjectView(mask, **more))  # type: ignore[arg-type]


def _points(prompt: ObjectPrompt) -> list[tuple[float, float]]:
    assert prompt.points is not None
    return [(float(x), float(y)) for x, y in prompt.points]


def test_one_box_spans_all_parts_and_several_one_each() -> None:
    assert [prompt.box for prompt in _make("box", _two_parts())] == [(4, 3, 25, 21)]
    assert [prompt.box for prompt in _make("boxes", _two_parts())] == [(4, 3, 10, 9), (23, 19, 25, 21)]
    assert [prompt.box for prompt in _make("boxes", _two_parts(), number=1)] == [(4, 3, 10, 9)]
    assert PROMPT_RULES["boxes"].predict_separately and not PROMPT_RULES["box"].predict_separately


def test_clicks_are_the_middles_of_the_parts() -> None:
    assert _points(_make("click", _two_parts())[0]) == [(7, 6)]
    assert _points(_make("clicks", _two_parts())[0]) == [(7, 6), (24, 20)]
    (both,) = _make("box_click", _two_parts())
    assert both.box == (4, 3, 25, 21) and _points(both) == [(7, 6)]


def test_the_deepest_point_may_lie_in_a_smaller_part() -> None:
    mask = np.zeros((20, 40), bool)
    mask[2:4, 0:40] = True  # 80 pixels, 1 deep
    mask[10:17, 3:10] = True  # 49 pixels, 4 deep
    assert _points(_make("click", mask)[0])[0][1] in (2, 3)
    assert _points(_make("deepest", mask)[0]) == [(6, 13)]


def test_a_mask_is_taken_as_it_is() -> None:
    (prompt,) = _make("mask", _two_parts())
    assert prompt.points is None and np.array_equal(prompt.mask, _two_parts())  # type: ignore[arg-type]


def test_a_recist_line_joins_the_farthest_pixels_and_its_middle() -> None:
    mask = np.zeros((20, 30), bool)
    mask[8:11, 5:26] = True
    points = _points(_make("recist", mask)[0])
    assert {points[0][0], points[1][0]} == {5, 25} and points[2] == (15, 9)
    bent = _two_parts()  # the middle between its parts is off the object
    assert len(_points(_make("recist", bent)[0])) == 2


def test_the_box_of_a_recist_line_is_a_square_around_it_inside_the_picture() -> None:
    mask = np.zeros((40, 30), bool)
    mask[20, 5:26] = True
    (prompt,) = _make("recist_box", mask)
    assert prompt.box == pytest.approx((5, 10, 25, 30))
    mask = np.zeros((40, 30), bool)
    mask[2, 5:26] = True
    (prompt,) = _make("recist_box", mask)
    assert prompt.box == pytest.approx((5, 0, 25, 12))


def test_scattered_points_begin_near_the_centroid_and_do_not_repeat() -> None:
    mask = np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True

    def scatter(number: int, seed: int) -> np.ndarray:
        return np.asarray(PROMPT_RULES["scattered"].make(ObjectView(mask, (), number, (seed,)))[0].points)

    points = scatter(6, 3)
    assert tuple(points[0]) == (4, 4) and len({tuple(point) for point in points}) == 6
    assert np.array_equal(points, scatter(6, 3)) and not np.array_equal(points, scatter(6, 4))
    assert len(scatter(99, 3)) == 25


def test_far_negatives_are_far_from_the_object_and_from_each_other() -> None:
    mask = np.zeros((40, 40), bool)
    mask[17:23, 17:23] = True
    points = NEGATIVE_RULES["far"](ObjectView(mask), 2)
    from_object = np.abs(points - 19.5).max(1)
    assert (from_object > 10).all() and np.linalg.norm(points[0] - points[1]) > 20


def test_near_negatives_lie_in_a_band_beside_the_object() -> None:
    mask = np.zeros((40, 40), bool)
    mask[17:23, 17:23] = True
    for x, y in NEGATIVE_RULES["near"](ObjectView(mask), 5):
        gap = np.hypot(max(17 - x, 0, x - 22), max(17 - y, 0, y - 22))
        assert 3 <= gap <= 8


def test_the_other_objects_clicks_are_negatives_the_largest_first() -> None:
    small, large = np.zeros((28, 34), bool), np.zeros((28, 34), bool)
    small[14:17, 2:5] = True
    large[1:8, 20:27] = True
    view = ObjectView(_two_parts(), (small, large))
    assert NEGATIVE_RULES["others"](view, 8).tolist() == [[23, 4], [3, 15]]
    assert NEGATIVE_RULES["others"](view, 1).tolist() == [[23, 4]]
    assert NEGATIVE_RULES["others"](ObjectView(_two_parts()), 8).shape == (0, 2)


def test_negatives_follow_the_points_of_any_prompt() -> None:
    negatives = np.array([[1, 2]], np.float32)
    (clicked,), (boxed,) = _make("click", _two_parts()), _make("box", _two_parts())
    assert clicked.with_negatives(negatives).labels.tolist() == [1, 0]  # type: ignore[union-attr]
    assert boxed.with_negatives(negatives).box == boxed.box and boxed.with_negatives(negatives).labels.tolist() == [0]  # type: ignore[union-attr]
    assert boxed.with_negatives(negatives[:0]) is boxed


@pytest.mark.parametrize("rule", [*PROMPT_RULES, *NEGATIVE_RULES])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_points_lie_on_their_side_of_any_mask_and_boxes_inside_the_picture(rule: str, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(3, 14)), data.draw(st.integers(3, 14))
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    mask[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = True
    if rule in PROMPT_RULES:
        prompts = PROMPT_RULES[rule].make(ObjectView(mask))
    else:
        negatives = NEGATIVE_RULES[rule](ObjectView(mask, (~mask,)), 3)
        prompts = [ObjectPrompt(box=(0, 0, 1, 1)).with_negatives(negatives)]
    for prompt in prompts:
        if prompt.points is not None and prompt.labels is not None:
            for (x, y), label in zip(prompt.points.astype(int), prompt.labels, strict=True):
                assert mask[y, x] == bool(label)
        if prompt.box is not None:
            x0, y0, x1, y1 = prompt.box
            assert 0 <= x0 <= x1 <= width - 1 and 0 <= y0 <= y1 <= height - 1
