from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases, layouts, load_case
from medsam2.errors import UserError
from medsam2.plugins import by_name


def test_every_data_set_below_a_folder_is_found_in_its_layout(raw_folder: Path):
    found = Counter((ref.dataset, ref.layout) for ref in find_cases(raw_folder))
    assert found == {
        ("Dataset001_Test", "nnunet_raw"): 4,
        ("echo", "davis_frames"): 2,
        ("recist", "medsam_npz"): 3,
        ("scope", "video_masks"): 2,
    }


def test_references_are_light_and_travel_to_other_processes(raw_folder: Path):
    for ref in find_cases(raw_folder):
        assert len(pickle.dumps(ref)) < 4000
        assert pickle.loads(pickle.dumps(ref)) == ref
        case = load_case(ref)
        assert (case.dataset, case.case_id, case.patient_id) == (ref.dataset, ref.case_id, ref.patient_id)


def test_one_layout_alone_is_looked_for_when_it_is_named(raw_folder: Path):
    assert {ref.layout for ref in find_cases(raw_folder, layout="davis_frames")} == {"davis_frames"}


def test_an_unknown_layout_or_modality_gets_the_closest(raw_folder: Path):
    with pytest.raises(UserError, match="Did you mean 'nnunet_raw'"):
        find_cases(raw_folder, layout="nnunet")
    with pytest.raises(UserError, match="Did you mean 'ENDOSCOPY'"):
        find_cases(raw_folder, modality="endoscop")


def test_a_wrong_path_gets_the_closest_one_that_exists(raw_folder: Path):
    with pytest.raises(UserError, match="Did you mean 'Dataset001_Test'"):
        find_cases(raw_folder / "Dataset001_Tset")
    with pytest.raises(UserError, match="Did you mean 'deep'"):
        find_cases(raw_folder / "deeep" / "echo")


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(UserError, match=r"no case found.*JPEGImages.*imagesTr/"):
        find_cases(tmp_path)


def test_a_folder_that_fits_two_layouts_needs_a_choice(tmp_path: Path, write):
    write.davis(tmp_path / "a")
    write.videos(tmp_path / "a")
    with pytest.raises(UserError, match="looks like davis_frames and video_masks"):
        find_cases(tmp_path)
    assert len(find_cases(tmp_path, layout="video_masks")) == 2


def test_two_data_sets_of_one_name_and_case_are_refused(tmp_path: Path, write):
    write.nnunet(tmp_path / "a" / "Dataset001")
    write.nnunet(tmp_path / "b" / "Dataset001")
    with pytest.raises(UserError, match="two cases are named Dataset001/smith_000"):
        find_cases(tmp_path)


def test_two_layouts_of_one_name_are_refused():
    with pytest.raises(RuntimeError, match="two layouts are named 'x'"):
        by_name([SimpleNamespace(NAME="x"), SimpleNamespace(NAME="x")], "layouts")


def test_every_layout_says_what_it_looks_for():
    for name, layout in layouts().items():
        assert name == layout.NAME
        assert layout.LOOKS_FOR


def test_shards_below_the_source_are_no_data(tmp_path: Path, write):
    write.nnunet(tmp_path / "Dataset001")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.arrow").touch()
    write.npz(tmp_path / "shards" / "CT_a.npz")
    assert {ref.dataset for ref in find_cases(tmp_path)} == {"Dataset001"}


def test_an_unknown_modality_fails_the_case_with_the_remedy(tmp_path: Path, write):
    ref = find_cases(write.nnunet(tmp_path / "Dataset001", channel="noNorm"))[0]
    with pytest.raises(CaseError, match="give --modality"):
        load_case(ref)
    assert load_case(find_cases(tmp_path, modality="MR")[0]).modality == "MR"
