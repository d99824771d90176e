from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases


def test_a_video_has_colour_frames_masks_and_time(tmp_path: Path, write):
    case = find_cases(write.videos(tmp_path / "scope"))[0].load()
    assert case.image.shape == (10, 32, 48, 3)
    assert np.array_equal(case.planes[0], write.clip(0)[1])
    assert case.spacing == pytest.approx((0.04, 1, 1))
    assert case.modality == "ENDOSCOPY"


def test_unequal_numbers_of_frames_and_masks_are_refused(tmp_path: Path, write):
    folder = write.videos(tmp_path / "scope", clips=1)
    (folder / "masks" / "v0" / "00009.png").unlink()
    with pytest.raises(CaseError, match="9 masks for a video of 10 frames"):
        find_cases(folder)[0].load()
