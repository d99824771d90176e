from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases, load_case
from medsam2.cases.layouts.medsam_npz import farthest_pair, patient_of


def test_deeplesion_names_tell_the_patient():
    assert patient_of("CT_Lesion_000015_01_01_081-093") == "000015"
    assert patient_of("CT_Lesion_000015_01_01_103-115") == "000015"
    assert patient_of("CT_Abd_17") == "CT_Abd_17"


def test_voxels_stay_as_stored_and_the_lesion_is_named(tmp_path: Path, write):
    path = write.npz(tmp_path / "set" / "CT_Lesion_000015_01_01_081-093.npz")
    case = load_case(find_cases(tmp_path)[0])
    with np.load(path) as content:
        assert np.array_equal(case.image, content["imgs"])
        assert np.array_equal(case.planes[0], content["gts"])
    assert [label.name for label in case.labels] == ["lesion"]
    assert (case.dataset, case.modality, case.kind) == ("set", "CT", "volume")
    assert case.affine is not None


def test_one_file_is_a_source_of_its_own(tmp_path: Path, write):
    path = write.npz(tmp_path / "set" / "MR_a.npz")
    assert [(r.case_id, r.modality) for r in find_cases(path)] == [("MR_a", "MR")]


def test_folder_named_like_an_npz_is_no_case(tmp_path: Path, write):
    write.npz(tmp_path / "set" / "MR_a.npz")
    (tmp_path / "set" / "MR_b.npz").mkdir()
    assert [ref.case_id for ref in find_cases(tmp_path)] == ["MR_a"]


def test_real_lesions_are_found_with_their_patients(test_data: Path):
    refs = find_cases(test_data / "ct" / "recist")
    assert sorted(ref.patient_id for ref in refs) == ["000001", "000002", "000015", "000015"]
    case = load_case(refs[0])
    assert case.spacing == pytest.approx((5.0, 0.31445301, 0.31445301))
    assert case.image.dtype == np.uint8


def with_recist(path: Path, recist: np.ndarray) -> Path:
    mask = np.zeros((4, 30, 40), np.uint8)
    mask[1:3, 5:20, 8:30] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, imgs=np.zeros((4, 30, 40), np.uint8), gts=mask, recist=recist, spacing=np.array([1.0, 1.0, 5.0]))
    return path


@pytest.mark.parametrize("value", [1, 7])
def test_drawn_diameters_become_lines(tmp_path: Path, value: int):
    recist = np.zeros((4, 30, 40), np.uint8)
    for step in range(11):
        recist[2, 6 + step, 9 + 2 * step] = value
    recist[2, 10, 15:18] = value  # drawn thicker in the middle
    case = load_case(find_cases(with_recist(tmp_path / "s" / "CT_Lesion_1.npz", recist))[0])
    assert [(line.frame, line.x0, line.y0, line.x1, line.y1, line.label) for line in case.lines] == [
        (2, 9.0, 6.0, 29.0, 16.0, "lesion")
    ]


def test_markers_of_another_shape_are_refused(tmp_path: Path):
    path = with_recist(tmp_path / "s" / "CT_a.npz", np.zeros((4, 30, 41), np.uint8))
    with pytest.raises(CaseError, match=r"CT_a\.npz: recist is uint8 \(4, 30, 41\)"):
        load_case(find_cases(path)[0])


def test_the_farthest_pixels_are_found_in_any_shape():
    for seed in range(20):
        pixels = np.argwhere(np.random.default_rng(seed).random((12, 15)) < 0.1)
        apart = ((pixels[:, None] - pixels[None]) ** 2).sum(-1).max()
        (y0, x0), (y1, x1) = farthest_pair(pixels)
        assert (y1 - y0) ** 2 + (x1 - x0) ** 2 == apart
