from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from medsam2.cases.geometry import Geometry, affine_from_itk, overlap, same_grid, slicing_code


def grid(spacing=(1.0, 1.0, 4.0), origin=(0.0, 0.0, 0.0), shape=(50, 40, 10)) -> Geometry:
    return Geometry(affine_from_itk(np.array(spacing), np.eye(3).ravel(), np.array(origin)), shape)


def test_grids_differ_by_more_than_rounding():
    assert same_grid(grid(), grid(origin=(0.02, 0, 0)))
    assert not same_grid(grid(), grid(origin=(0.5, 0, 0)))
    assert not same_grid(grid(), grid(spacing=(1.0, 1.0, 4.1)))
    assert not same_grid(grid(), grid(shape=(50, 40, 11)))


def test_boxes_that_only_touch_from_afar_do_not_overlap():
    assert overlap(grid(), grid(origin=(40, 30, 30)))
    assert not overlap(grid(), grid(origin=(100, 0, 0)))
    assert not overlap(grid(), grid(origin=(0, 0, 400)))


@pytest.mark.parametrize(
    ("spacing", "code"),
    [
        ((1, 1, 5), "LPS"), ((5, 1, 1), "PIL"), ((1, 5, 1), "LIP"), ((1, 1, 1), "LPS"), ((1.005, 1, 1), "LPS"),
    ],
)  # fmt: skip
def test_slices_run_along_the_coarsest_axis_and_axial_wins_ties(spacing: tuple, code: str):
    image = sitk.Image(4, 5, 6, sitk.sitkInt16)
    image.SetSpacing(spacing)
    assert slicing_code(image) == code
