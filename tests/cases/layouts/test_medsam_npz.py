from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.layouts import find_cases
from medsam2.cases.layouts.medsam_npz import patient_of


def test_deeplesion_names_tell_the_patient():
    assert patient_of("CT_Lesion_000015_01_01_081-093") == "000015"
    assert patient_of("CT_Lesion_000015_01_01_103-115") == "000015"
    assert patient_of("CT_Abd_17") == "CT_Abd_17"


def test_voxels_stay_as_stored_and_the_lesion_is_named(tmp_path: Path, write):
    path = write.npz(tmp_path / "set" / "CT_Lesion_000015_01_01_081-093.npz")
    case = find_cases(tmp_path)[0].load()
    with np.load(path) as content:
        assert np.array_equal(case.image, content["imgs"])
        assert np.array_equal(case.planes[0], content["gts"])
    assert [label.name for label in case.labels] == ["lesion"]
    assert (case.dataset, case.modality, case.kind) == ("set", "CT", "volume")
    assert case.affine is not None


def test_one_file_is_a_source_of_its_own(tmp_path: Path, write):
    path = write.npz(tmp_path / "set" / "MR_a.npz")
    assert [(r.case_id, r.modality) for r in find_cases(path)] == [("MR_a", "MR")]


def test_real_lesions_are_found_with_their_patients(test_data: Path):
    refs = find_cases(test_data / "ct" / "recist")
    assert sorted(ref.patient_id for ref in refs) == ["000001", "000002", "000015", "000015"]
    case = refs[0].load()
    assert case.spacing == pytest.approx((5.0, 0.31445301, 0.31445301))
    assert case.image.dtype == np.uint8
