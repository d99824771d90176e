from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medsam2.cases import objects as module
from medsam2.cases.case import Case, CaseError, Label, Line
from medsam2.cases.objects import apply_labels, pack
from medsam2.cases.settings import LabelRules

NAMES = ("liver", "kidney left", "kidney right", "tumour", "cyst")


def case_of(planes: np.ndarray, labels: tuple[Label, ...], lines: tuple[Line, ...] = ()) -> Case:
    image = np.ones(planes.shape[1:], np.uint8)
    return Case(image, planes, labels, (1.0, 1.0, 1.0), "CT", "volume", "d", "c", "p", lines=lines)


def masks_of(case: Case) -> dict[str, np.ndarray]:
    """The union of all objects of each name."""
    masks: dict[str, np.ndarray] = {}
    for label in case.labels:
        mask = case.planes[label.plane] == label.id
        masks[label.name] = masks.get(label.name, np.zeros_like(mask)) | mask
    return masks


def parts_of(case: Case, name: str) -> list[np.ndarray]:
    return [case.planes[label.plane] == label.id for label in case.labels if label.name == name]


def assert_tidy(case: Case) -> None:
    """Values run from 1 in every plane without a gap, and nothing else is in it."""
    for plane in range(case.planes.shape[0]):
        ids = [label.id for label in case.labels if label.plane == plane]
        assert ids == list(range(1, len(ids) + 1))
        assert set(np.unique(case.planes[plane]).tolist()) <= {0, *ids}


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[type, ...] = (np.uint8, np.uint16, np.int32)) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 2))
    shape = (count, draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    ids = np.array([0, *rng.choice(np.arange(1, 200), len(NAMES), replace=False)])
    planes = ids[rng.integers(0, len(ids), shape) * (rng.random(shape) < draw(st.floats(0.1, 1)))]
    labels = tuple(Label(int(v), name, p) for p in range(count) for name, v in zip(NAMES, ids[1:], strict=True))
    return case_of(planes.astype(draw(st.sampled_from(dtypes))), labels)


def cube() -> Case:
    """Two tumours that touch by a corner, one apart, and a liver."""
    plane = np.zeros((3, 6, 6), np.uint8)
    plane[0, 0, 0] = plane[1, 1, 1] = 7
    plane[2, 4:, 4:] = 7
    plane[1, 3, :3] = 9
    return case_of(plane[None], (Label(7, "tumour"), Label(9, "liver")))


def test_without_anything_to_do_the_case_itself_comes_back():
    case = cube()
    assert apply_labels(case, LabelRules(), 1) is case


def test_labels_are_renamed_by_name_before_pattern():
    rules = LabelRules(rename={"kidney*": "kidney", "kidney left": "left one"})
    plane = np.arange(6).reshape(1, 1, 1, 6)
    labels = tuple(Label(v, name) for v, name in enumerate(NAMES, start=1))
    result = apply_labels(case_of(plane, labels), rules, 1)
    assert [label.name for label in result.labels] == ["liver", "left one", "kidney", "tumour", "cyst"]


@given(cases())
@settings(max_examples=80, deadline=None)
def test_merging_keeps_every_voxel_and_makes_one_value(case: Case):
    before = masks_of(case)
    for rules in (
        LabelRules(merge={"kidney": ("kidney*",)}),
        LabelRules(rename={f"kidney {s}": "kidney" for s in ("left", "right")}),
    ):
        result = apply_labels(case, rules, 1)
        after = masks_of(result)
        kidney = before["kidney left"] | before["kidney right"]
        # what spans several planes and has no voxel in any of them is no object
        assert len(parts_of(result, "kidney")) == 1 or (case.planes.shape[0] > 1 and not kidney.any())
        assert np.array_equal(after.get("kidney", np.zeros_like(kidney)), kidney)
        for name in ("liver", "tumour", "cyst"):
            assert np.array_equal(after[name], before[name])
        assert_tidy(result)


def test_a_structure_over_several_planes_moves_to_one_of_its_own():
    planes = np.zeros((2, 1, 1, 4), np.uint8)
    planes[0, 0, 0] = [1, 1, 2, 0]
    planes[1, 0, 0] = [0, 3, 3, 0]
    case = case_of(planes, (Label(1, "a"), Label(2, "b"), Label(3, "c", 1)))
    result = apply_labels(case, LabelRules(merge={"ac": ("a", "c")}), 1)
    assert result.labels == (Label(1, "b", 0), Label(1, "ac", 1))
    assert result.planes[:, 0, 0].tolist() == [[0, 0, 1, 0], [1, 1, 1, 0]]


def test_instances_of_the_source_stay_apart_unless_a_merge_names_them():
    plane = np.array([1, 2, 3, 0]).reshape(1, 1, 1, 4)
    case = case_of(plane, (Label(1, "cell"), Label(2, "cell"), Label(3, "debris")))
    assert len(parts_of(apply_labels(case, LabelRules(drop=("debris",)), 1), "cell")) == 2
    assert len(parts_of(apply_labels(case, LabelRules(rename={"cell": "nucleus"}), 1), "nucleus")) == 2
    assert len(parts_of(apply_labels(case, LabelRules(merge={"cell": ("debris",)}), 1), "cell")) == 1
    assert len(parts_of(apply_labels(case, LabelRules(instances=("cell",)), 1), "cell")) == 2


@given(cases())
@settings(max_examples=60, deadline=None)
def test_keep_and_drop_choose_whole_structures(case: Case):
    before = masks_of(case)
    result = apply_labels(case, LabelRules(keep=("kidney*", "liver"), drop=("*right",)), 1)
    after = masks_of(result)
    assert set(after) == {"liver", "kidney left"}
    assert all(np.array_equal(mask, before[name]) for name, mask in after.items())
    assert_tidy(result)


def test_names_of_other_cases_are_no_error_but_keeping_nothing_is():
    rules = LabelRules(rename={"x": "y"}, merge={"z": ("q",)}, drop=("nothing",), instances=("spleen",))
    assert set(masks_of(apply_labels(cube(), rules, 1))) == {"tumour", "liver"}
    with pytest.raises(CaseError, match=r"d/c: labels: keep spleen removes all of lesion, liver\. Keep at least one"):
        apply_labels(cube(), LabelRules(rename={"tumour": "lesion"}, keep=("spleen",)), 1)
    unlabelled = case_of(np.zeros((1, 1, 2, 2), np.uint8), ())
    assert apply_labels(unlabelled, LabelRules(keep=("spleen",)), 1).labels == ()


def test_dropping_all_leaves_one_empty_plane():
    result = apply_labels(cube(), LabelRules(drop=("*",)), 1)
    assert result.labels == ()
    assert result.planes.shape == (1, 3, 6, 6)
    assert not result.planes.any()


def test_instances_touch_by_corners_and_are_ordered_by_their_first_voxel():
    result = apply_labels(cube(), LabelRules(instances=("tum*",)), 1)
    assert result.labels == (Label(1, "liver"), Label(2, "tumour"), Label(3, "tumour"))
    assert [int(mask.sum()) for mask in parts_of(result, "tumour")] == [2, 4]
    assert result.planes[0, 0, 0, 0] == result.planes[0, 1, 1, 1] == 2
    assert result.planes.dtype == np.uint8


@given(cases(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_instances_are_the_connected_parts_of_the_structure(case: Case, min_voxels: int):
    rules = LabelRules(merge={"lesion": ("tumour", "cyst")}, instances=("lesion",))
    result = apply_labels(case, rules, min_voxels)
    before = masks_of(case)
    parts, number = ndimage.label(before["tumour"] | before["cyst"], np.ones((3, 3, 3)))
    oracle = [parts == k for k in range(1, number + 1) if (parts == k).sum() >= min_voxels]
    oracle.sort(key=lambda mask: np.flatnonzero(mask)[0])
    lesions = parts_of(result, "lesion")
    assert len(lesions) == len(oracle)
    assert all(np.array_equal(a, b) for a, b in zip(lesions, oracle, strict=True))
    assert_tidy(result)


@given(cases(), st.integers(2, 12), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_raising_min_voxels_only_removes_whole_objects(case: Case, low: int, more: int):
    few, many = apply_labels(case, LabelRules(), low + more), apply_labels(case, LabelRules(), low)
    sizes = {(label.plane, label.name): int((case.planes[label.plane] == label.id).sum()) for label in case.labels}
    assert sorted(mask.sum() for n in NAMES for mask in parts_of(many, n)) == sorted(
        s for s in sizes.values() if s >= low
    )
    assert sorted(mask.sum() for n in NAMES for mask in parts_of(few, n)) == sorted(
        s for s in sizes.values() if s >= low + more
    )
    larger = masks_of(many)
    assert all(not (mask & ~larger[name]).any() for name, mask in masks_of(few).items())
    assert_tidy(many)


def test_min_voxels_counts_a_structure_after_merging_over_all_planes():
    planes = np.zeros((2, 1, 1, 4), np.uint8)
    planes[0, 0, 0, :2] = 1
    planes[1, 0, 0, 1:3] = 1
    case = case_of(planes, (Label(1, "a"), Label(1, "b", 1)))
    rules = LabelRules(merge={"ab": ("a", "b")})
    assert [label.name for label in apply_labels(case, rules, 3).labels] == ["ab"]
    assert apply_labels(case, rules, 4).labels == ()


def test_many_instances_get_sixteen_bits_and_too_many_are_refused(monkeypatch: pytest.MonkeyPatch):
    plane = np.zeros((1, 1, 40, 40), np.uint8)
    plane[0, 0, ::2, ::2] = 1
    case = case_of(plane, (Label(1, "cell"),))
    result = apply_labels(case, LabelRules(instances=("cell",)), 1)
    assert result.planes.dtype == np.uint16
    assert result.planes.max() == len(result.labels) == 400
    assert result.planes[0, 0, ::2, ::2].ravel().tolist() == list(range(1, 401))
    monkeypatch.setattr(module, "MAX_LABEL", 399)
    with pytest.raises(CaseError, match=r"d/c: 400 objects in one label plane.*Raise min_voxels"):
        apply_labels(case, LabelRules(instances=("cell",)), 1)


def test_lines_follow_the_names_of_their_labels():
    lines = (Line(0, 1, 2, 3, 4, "tumour"), Line(1, 1, 2, 3, 4, "node"), Line(2, 0, 0, 1, 1, "liver"))
    case = case_of(cube().planes, cube().labels, lines)
    rules = LabelRules(rename={"tumour": "lesion"}, merge={"lesions": ("lesion", "node")}, drop=("liver",))
    result = apply_labels(case, rules, 1)
    assert result.lines == (Line(0, 1, 2, 3, 4, "lesions"), Line(1, 1, 2, 3, 4, "lesions"))
    assert apply_labels(case, LabelRules(keep=("node",)), 1).labels == ()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.uint64])
def test_any_integer_type_of_plane_is_read(dtype: type):
    plane = np.array([0, 3, 5, 90], dtype).reshape(1, 1, 2, 2)
    result = apply_labels(case_of(plane, (Label(3, "a"), Label(5, "b"))), LabelRules(drop=("b",), instances=("a",)), 1)
    assert result.planes.ravel().tolist() == [0, 1, 0, 0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0, 0.6))
@settings(max_examples=80, deadline=None)
def test_packed_masks_come_back_whole(seed: int, count: int, density: float):
    rng = np.random.default_rng(seed)
    masks = [(f"m{k}", rng.random((2, 4, 5)) < density * rng.random()) for k in range(count)]

    def one_at_a_time() -> Iterator[tuple[str, np.ndarray]]:
        yield from masks

    planes, labels = pack(one_at_a_time())
    assert planes.dtype == np.uint8
    filled = [(name, mask) for name, mask in masks if mask.any()]
    assert [label.name for label in labels] == [name for name, _ in filled]
    for label, (_, mask) in zip(labels, filled, strict=True):
        assert np.array_equal(planes[label.plane] == label.id, mask)
        # first fit: every plane before is taken by an earlier mask
        earlier = labels[: labels.index(label)]
        for plane in range(label.plane):
            assert any((mask & (planes[plane] == e.id)).any() for e in earlier if e.plane == plane)
    assert planes.shape[0] == max([label.plane for label in labels], default=0) + 1


def test_packing_disjoint_masks_takes_one_plane_and_sixteen_bits_where_needed():
    def masks() -> Iterator[tuple[str, np.ndarray]]:
        for k in range(300):
            mask = np.zeros((1, 1, 300), np.bool_)
            mask[0, 0, k] = True
            yield f"m{k}", mask

    planes, labels = pack(masks())
    assert planes.dtype == np.uint16
    assert planes.ravel().tolist() == list(range(1, 301))
    assert labels[-1] == Label(300, "m299")


def test_packing_refuses_no_masks_and_masks_of_two_shapes():
    with pytest.raises(CaseError, match="the case has no masks"):
        pack([])
    with pytest.raises(CaseError, match=r"'b': mask \(1, 2, 3\), but the masks before it are \(1, 2, 2\)"):
        pack([("a", np.ones((1, 2, 2), bool)), ("b", np.ones((1, 2, 3), bool))])
    planes, labels = pack([("a", np.zeros((1, 2, 2), bool))])
    assert planes.shape == (1, 1, 2, 2)
    assert labels == ()
