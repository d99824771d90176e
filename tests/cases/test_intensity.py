from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsam2.cases.case import Case, CaseError
from medsam2.cases.intensity import (
    Quantiles,
    case_quantiles,
    merge_quantiles,
    percentiles_above_zero,
    to_uint8,
)
from medsam2.cases.settings import WINDOW_PRESETS, Window, check_window


def case_of(image: np.ndarray, modality: str = "CT", window: Window | None = None) -> Case:
    planes = np.zeros((1, *image.shape[:3]), np.uint8)
    return Case(
        image,
        planes,
        (),
        (1.0, 1.0, 1.0),
        modality,
        "volume",
        "d",
        "c",
        "p",
        window=window,  # type: ignore[arg-type]
    )


def test_ct_maps_the_bounds_of_the_window_not_the_values_found():
    image = np.array([[[-1000, -160, 40, 239, 240, 3000]]], np.int16)
    scaled, text = to_uint8(case_of(image))
    assert text == "-160:240 HU"
    assert scaled.ravel().tolist() == [0, 0, 128, 254, 255, 255]
    narrow, _ = to_uint8(case_of(np.array([[[0, 100]]], np.int16)))
    assert narrow.ravel().tolist() == [102, 166]


@pytest.mark.parametrize("dtype", [np.int16, ">i2", np.int32, np.float32, np.float64])
@pytest.mark.parametrize("repeats", [1, 100])  # 100: large enough for the table of 16-bit values
def test_the_type_of_ct_does_not_change_the_picture(dtype: str | type, repeats: int):
    image = np.tile(np.arange(-400, 500).reshape(1, 30, 30), (repeats, 1, 1))
    expected = np.rint(np.clip((image + 160) * (255 / 400), 0, 255))
    # halves may round either way, in float32
    assert np.abs(to_uint8(case_of(image.astype(dtype)))[0] - expected).max() <= 1
    assert np.array_equal(to_uint8(case_of(image.astype(dtype)))[0], to_uint8(case_of(image.astype(np.int16)))[0])


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_mr_maps_percentiles_of_the_foreground_and_keeps_zeros(dtype: type):
    image = np.random.default_rng(0).gamma(2, 300, (4, 20, 20)).astype(dtype)
    image[:, :5] = 0
    low, high = np.percentile(image[image > 0], (0.5, 99.5))
    expected = np.rint(np.clip((image - low) / (high - low) * 255, 0, 255))
    expected[image == 0] = 0
    scaled, text = to_uint8(case_of(image, "MR"))
    assert np.abs(scaled.astype(int) - expected).max() <= 1
    assert (scaled[image == 0] == 0).all()
    assert "percentiles" in text


@given(st.lists(st.integers(-50, 2000), min_size=1, max_size=200).filter(lambda v: max(v) > 0))
@settings(max_examples=100, deadline=None)
def test_percentiles_from_counts_equal_those_of_numpy(values: list[int]):
    image = np.array(values, np.int16).reshape(1, 1, -1)
    low, high = percentiles_above_zero(image, "x")
    expected = np.percentile(image[image > 0], (0.5, 99.5))
    assert high == pytest.approx(expected[1])
    if expected[0] == expected[1]:
        assert low == 0
    else:
        assert low == pytest.approx(expected[0])


def test_uint8_and_rgb_stay_as_they_are():
    grey = np.random.default_rng(0).integers(0, 255, (2, 4, 5), dtype=np.uint8)
    rgb = np.repeat(grey[..., None], 3, 3)
    for image, modality in ((grey, "CT"), (grey, "US"), (rgb, "ENDOSCOPY")):
        scaled, text = to_uint8(case_of(image, modality))
        assert np.array_equal(scaled, image)
        assert text == "as stored"


def test_an_empty_image_and_deep_rgb_are_refused():
    with pytest.raises(CaseError, match="no voxel above zero"):
        to_uint8(case_of(np.full((2, 3, 3), -5, np.int16), "MR"))
    for image in (np.zeros((2, 3, 3), np.int16), np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3, 3, 3), np.uint8)):
        for modality in ("CT", "MR", "ENDOSCOPY"):
            with pytest.raises(CaseError, match="the image is empty: every voxel is 0"):
                to_uint8(case_of(image, modality))
    with pytest.raises(CaseError, match="RGB of type uint16"):
        to_uint8(case_of(np.ones((2, 3, 3, 3), np.uint16), "ENDOSCOPY"))


def test_ct_of_one_value_and_pictures_of_two_values_are_scaled():
    assert not to_uint8(case_of(np.full((2, 3, 3), -1024, np.int16)))[0].any()
    two = np.array([[[0, 1000], [1000, 0]]], np.int16)
    assert to_uint8(case_of(two, "MICROSCOPY"))[0].ravel().tolist() == [0, 255, 255, 0]
    assert to_uint8(case_of(two > 0, "MICROSCOPY"))[0].ravel().tolist() == [0, 255, 255, 0]


def test_a_window_is_a_preset_numbers_percentiles_or_what_the_source_carries():
    image = np.array([[[-1350, 0, 150, 500]]], np.int16)
    ct = case_of(image, "CT", window=(0.0, 100.0))
    assert to_uint8(ct, "lung")[0].ravel().tolist() == [0, 230, 255, 255]
    assert to_uint8(ct, "lung")[1] == "-1350:150 HU"
    assert to_uint8(ct, (0, 500))[0].ravel().tolist() == [0, 0, 76, 255]
    assert to_uint8(ct, "dicom")[0].ravel().tolist() == [0, 0, 255, 255]
    assert to_uint8(ct, "dicom")[1] == "0:100 HU (dicom)"
    low, high = np.percentile([150, 500], (10, 90))
    assert to_uint8(ct, "percentiles", (10, 90))[1] == f"{low:g}:{high:g} (percentiles 10-90 above zero)"
    assert to_uint8(case_of(image, "MR"), (0, 500))[1] == "0:500"


def test_presets_are_in_hu_and_leave_other_scans_at_their_default():
    image = np.random.default_rng(0).integers(0, 900, (2, 8, 8)).astype(np.int16)
    default, text = to_uint8(case_of(image, "MR"))
    for window in (*WINDOW_PRESETS, "percentiles"):
        scaled, description = to_uint8(case_of(image, "MR"), window)
        assert description == text
        assert np.array_equal(scaled, default)


@pytest.mark.parametrize(
    ("window", "match"),
    [
        ("dicom", "stores no window.*Set window to LO:HI"),
        ("dataset-percentiles", "needs all cases"),
    ],
)
def test_a_window_that_cannot_be_had_is_refused(window: str | Window, match: str):
    with pytest.raises(CaseError, match=match):
        to_uint8(case_of(np.ones((1, 2, 2), np.int16)), window)


def test_quantiles_are_those_of_numpy_and_do_not_depend_on_the_type():
    image = np.random.default_rng(0).gamma(2, 300, (4, 40, 40)).astype(np.int16) - 100
    probabilities = np.linspace(0, 1, 1001)
    for dtype in (np.int16, np.int32, np.float32, np.float64):
        quantiles = case_quantiles(case_of(image.astype(dtype), "MR"))
        assert quantiles.count == (image > 0).sum()
        assert quantiles.values == pytest.approx(np.quantile(image[image > 0], probabilities))
    assert case_quantiles(case_of(np.zeros((1, 2, 2), np.float32), "MR")) == Quantiles(0, ())


def test_merged_quantiles_are_close_to_the_percentiles_of_all_voxels():
    rng = np.random.default_rng(0)
    images = [rng.gamma(2 + k, 100 * (k + 1), (3 + k, 60, 60)).astype(np.float32) for k in range(5)]
    parts = [case_quantiles(case_of(image, "MR")) for image in images]
    pooled = np.concatenate([image.ravel() for image in images])
    for percentiles in ((0.5, 99.5), (1.0, 99.0), (25.0, 50.0)):
        expected = np.percentile(pooled[pooled > 0], percentiles)
        assert merge_quantiles(parts, percentiles) == pytest.approx(expected, rel=0.02)
    alone = case_quantiles(case_of(images[0], "MR"))
    assert merge_quantiles([alone]) == pytest.approx(percentiles_above_zero(images[0], "x"), rel=1e-6)


@given(
    st.lists(st.lists(st.integers(-3, 40), min_size=1, max_size=60), min_size=1, max_size=6),
    st.sampled_from([(0.5, 99.5), (0.0, 100.0), (10.0, 60.0)]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_the_rank_of_merged_quantiles_is_right_in_any_order_of_the_cases(
    cases: list[list[int]], percentiles: Window, random: Random
):
    parts = [case_quantiles(case_of(np.array(v, np.int16).reshape(1, 1, -1), "MR")) for v in cases]
    pooled = np.array([v for values in cases for v in values if v > 0])
    if not pooled.size:
        with pytest.raises(CaseError, match="none of"):
            merge_quantiles(parts, percentiles)
        return
    window = merge_quantiles(parts, percentiles)
    assert window[0] < window[1]
    # each case is known to 0.1 percent of its voxels, and to one voxel, between which numpy interpolates
    slack = 0.1 + 100 * (len(cases) + 1) / pooled.size
    for bound, percentile in zip(window, percentiles, strict=True):
        low, high = np.percentile(pooled, [max(0, percentile - slack), min(100, percentile + slack)])
        assert low - 1e-9 <= bound <= high + 1e-9 or bound == window[0] == 0.0
    shuffled = list(parts)
    random.shuffle(shuffled)
    assert merge_quantiles(shuffled, percentiles) == window


def test_windows_are_given_by_bounds_or_name():
    assert check_window("-100:300.5") == (-100.0, 300.5)
    assert check_window("lung") == "lung"
    assert WINDOW_PRESETS["bone"] == (-500.0, 1300.0)
    refused = [("300:100", "below"), ("-inf:5", "finite"), ("5:nan", "finite"), ("lnug", "Did you mean 'lung'")]
    for text, match in [*refused, ("", "expected LO:HI")]:
        with pytest.raises(ValueError, match=match):
            check_window(text)
