from __future__ import annotations

from pathlib import Path

import pytest
from small_shards import Scan, build, patient_id

from medsam2.data.read.catalog import Catalog
from medsam2.errors import UserError


def test_a_patient_in_two_splits_of_two_folders_is_refused_by_the_salted_id(tmp_path: Path):
    first = Catalog(build(tmp_path / "a", [Scan("smith", "d-train-000000.tar"), Scan("jones", "d-val-000000.tar")]))
    same = Catalog(build(tmp_path / "b", [Scan("smith", "d-train-000000.tar", number=1)]))
    other = Catalog(build(tmp_path / "c", [Scan("smith", "d-val-000000.tar", number=2)]))
    Catalog.check_patients([first, same])
    Catalog.check_patients([other])
    with pytest.raises(
        UserError, match=rf"patient {patient_id('smith')} is in train of .*a and in val of .*c; take the patient out"
    ):
        Catalog.check_patients([first, same, other])
