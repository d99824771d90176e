from __future__ import annotations

from pathlib import Path

import numpy as np

from medsam2.cases.layouts import find_cases
from medsam2.cases.settings import DatasetSettings, SettingsBook
from medsam2.shards.stage import make_job
from medsam2.shards.statistics import with_dataset_windows

BOOK = SettingsBook(common=DatasetSettings(window="dataset-percentiles"))


def test_one_window_for_a_data_set_comes_from_its_training_cases_alone(tmp_path: Path, write):
    source = write.nnunet(tmp_path / "set", cases=4, channel="T1")
    image, _ = write.scan(3)
    write.volume(source / "imagesTr" / "smith_003_0000.nii.gz", (image * 50).astype(np.int16))  # far brighter
    refs = find_cases(source, book=BOOK)
    jobs = [make_job(ref, "val" if n == 3 else "train", b"salt") for n, ref in enumerate(refs)]
    resolved, windows = with_dataset_windows(jobs, {})
    assert len({job.ref.settings.window for job in resolved}) == 1
    pooled = np.concatenate([write.scan(n)[0][write.scan(n)[0] > 0].ravel() for n in range(3)])
    low, high = windows["set"]
    assert np.allclose([low, high], np.percentile(pooled, (0.5, 99.5)), atol=2)
    assert resolved[3].ref.settings.window == (low, high)


def test_a_window_that_is_published_holds_for_cases_that_are_added(tmp_path: Path, write):
    refs = find_cases(write.nnunet(tmp_path / "set", cases=2, channel="T1"), book=BOOK)
    jobs = [make_job(ref, "train", b"salt") for ref in refs]

    def never(jobs: object) -> list:
        assert not jobs, "nothing is read again"
        return []

    resolved, windows = with_dataset_windows(jobs, {"set": (3.0, 500.0)}, never)
    assert {job.ref.settings.window for job in resolved} == {(3.0, 500.0)} and windows == {"set": (3.0, 500.0)}


def test_a_case_that_cannot_be_read_is_left_to_staging(tmp_path: Path, write):
    source = write.nnunet(tmp_path / "set", cases=3, channel="T1")
    (source / "imagesTr" / "smith_000_0000.nii.gz").write_bytes(b"")
    jobs = [make_job(ref, "train", b"salt") for ref in find_cases(source, book=BOOK)]
    resolved, windows = with_dataset_windows(jobs, {})
    assert "set" in windows and len(resolved) == 3
