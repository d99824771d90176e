from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from medsam2.cases.layouts import find_cases
from medsam2.shards.index import read_index
from medsam2.shards.inspect import check_shards, structure_table, survey_case
from medsam2.shards.page import cases_page, shards_page, thumbnail


def test_structures_are_counted_by_data_set_and_split(shards: Path):
    entries = structure_table(read_index(shards))
    organs = [e for e in entries if (e.dataset, e.structure) == ("Dataset001_Test", "organ")]
    assert sum(e.patients for e in organs) == 4
    assert sum(e.frames for e in organs) == 4 * 6
    lesion = next(e for e in entries if (e.dataset, e.structure) == ("Dataset001_Test", "lesion"))
    assert lesion.median_pixels == 24


def test_sound_shards_have_no_problem_and_cut_or_missing_ones_do(shards: Path, tmp_path: Path):
    assert check_shards(read_index(shards)) == []
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    first, second = sorted(folder.glob("*.tar"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    problems = check_shards(read_index(folder))
    assert len(problems) == 2
    assert "missing" in problems[0]
    assert "bytes, expected" in problems[1]


def test_a_case_is_surveyed_with_its_shape_spacing_and_labels(raw_folder: Path):
    survey = survey_case(find_cases(raw_folder)[0])
    assert (survey.shape, survey.spacing, survey.labels) == ("12 x 40 x 48 int16", "4 x 1 x 1 mm", "organ, lesion")


def test_a_broken_case_is_surveyed_by_its_error(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    (folder / "imagesTr" / "smith_000_0000.nii.gz").write_bytes(b"no scan")
    assert "no NIfTI header" in survey_case(find_cases(folder)[0]).error


def test_pages_are_self_contained_and_name_no_patient(shards: Path, raw_folder: Path):
    refs = find_cases(raw_folder)
    pages = [shards_page(read_index(shards), []), cases_page(refs, [survey_case(ref) for ref in refs])]
    for page in pages:
        assert "smith" not in page
        assert "CT_Lesion" not in page
        assert not re.search(r'(src|href)="(?!data:)', page)
        pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
        assert len(pictures) >= 11
        assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).mode == "RGB"


def test_the_outline_of_a_mask_is_drawn(tmp_path: Path):
    planes = np.zeros((1, 64, 64), np.uint8)
    planes[0, 16:48, 16:48] = 1
    data = base64.b64decode(thumbnail(np.zeros((64, 64), np.uint8), planes))
    picture = np.array(Image.open(io.BytesIO(data)))
    red = picture[..., 0] == 255
    assert red[64, 100]
    assert not red[128, 128]
    assert not red[10, 10]
