from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsam2.cases.case import Case, CaseError
from medsam2.cases.intensity import WINDOWS, parse_window, percentiles_above_zero, to_uint8
from medsam2.errors import UserError


def case_of(image: np.ndarray, modality: str = "CT") -> Case:
    planes = np.zeros((1, *image.shape[:3]), np.uint8)
    return Case(image, planes, (), (1.0, 1.0, 1.0), modality, "volume", "d", "c", "p")  # type: ignore[arg-type]


def test_ct_maps_the_bounds_of_the_window_not_the_values_found():
    image = np.array([[[-1000, -160, 40, 239, 240, 3000]]], np.int16)
    scaled, text = to_uint8(case_of(image))
    assert text == "-160:240 HU"
    assert scaled.ravel().tolist() == [0, 0, 128, 254, 255, 255]
    narrow, _ = to_uint8(case_of(np.array([[[0, 100]]], np.int16)))
    assert narrow.ravel().tolist() == [102, 166]


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_the_type_of_ct_does_not_change_the_picture(dtype: type):
    image = np.arange(-400, 500).reshape(1, 30, 30)
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
    assert low == pytest.approx(expected[0])
    assert high == pytest.approx(expected[1] if expected[1] > expected[0] else expected[0] + 1)


def test_uint8_and_rgb_stay_as_they_are():
    grey = np.random.default_rng(0).integers(0, 255, (2, 4, 5), dtype=np.uint8)
    rgb = np.repeat(grey[..., None], 3, 3)
    for image, modality in ((grey, "CT"), (grey, "US"), (rgb, "ENDOSCOPY")):
        scaled, text = to_uint8(case_of(image, modality))
        assert np.array_equal(scaled, image)
        assert text == "as stored"


def test_an_empty_image_and_deep_rgb_are_refused():
    with pytest.raises(CaseError, match="no voxel above zero"):
        to_uint8(case_of(np.zeros((2, 3, 3), np.int16), "MR"))
    with pytest.raises(CaseError, match="RGB of type uint16"):
        to_uint8(case_of(np.zeros((2, 3, 3, 3), np.uint16), "ENDOSCOPY"))


def test_windows_are_given_by_bounds_or_name():
    assert parse_window("-100:300.5") == (-100.0, 300.5)
    assert parse_window("lung") == (-1350.0, 150.0)
    assert WINDOWS["bone"] == (-500.0, 1300.0)
    for text, match in (("300:100", "below"), ("lnug", "Did you mean 'lung'"), ("", "expected LO:HI")):
        with pytest.raises(UserError, match=match):
            parse_window(text)
