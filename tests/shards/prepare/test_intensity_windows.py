from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.settings import DatasetSettings, SettingsBook
from medsam2.shards.index import read_index
from medsam2.shards.prepare.plan import make_plan
from medsam2.shards.prepare.run import PrepareOptions, prepare

BOOK = SettingsBook(common=DatasetSettings(window="dataset-percentiles", percentiles=(0, 100)))
OPTIONS = PrepareOptions(book=BOOK, modality="MR", shares={"train": 0.5, "val": 0.5})


@pytest.fixture
def raw(tmp_path: Path, write) -> Path:
    """Six scans of which each is brighter than the one before."""
    folder = write.nnunet(tmp_path / "raw" / "Dataset001", cases=6, channel="MRI")
    for number in range(6):
        image = np.full((12, 40, 48), 10 * (number + 1), np.int16)
        image[0] = 1
        write.volume(folder / "imagesTr" / f"smith_{number:03d}_0000.nii.gz", image)
    return folder


def test_one_window_comes_from_the_training_cases_alone_and_is_kept(tmp_path: Path, raw: Path):
    result = prepare(raw, tmp_path / "shards", OPTIONS)
    jobs = make_plan(raw, OPTIONS).jobs
    brightest = max(10 * (int(job.ref.case_id[-3:]) + 1) for job in jobs if job.split == "train")
    low, high = result.summary["configuration"]["dataset_windows"]["Dataset001"]
    assert (low, high) == (1, pytest.approx(brightest, abs=0.2))
    index = read_index(tmp_path / "shards")
    assert len({index.row(n).window for n in range(len(index))}) == 1


def test_a_case_that_cannot_be_read_does_not_count_and_fails_later(tmp_path: Path, raw: Path):
    (raw / "labelsTr" / "smith_002.nii.gz").write_bytes(b"")
    result = prepare(raw, tmp_path / "shards", OPTIONS)
    assert [f.job.ref.case_id for f in result.failures] == ["smith_002"]
