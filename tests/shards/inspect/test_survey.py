from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from medsam2.cases.layouts import find_cases
from medsam2.errors import UserError
from medsam2.reporting.page import render
from medsam2.reporting.tables import Table
from medsam2.shards.index import SUMMARY_FILE, SegmentIndex, read_index, read_summary, write_index
from medsam2.shards.inspect import survey as inspect
from medsam2.shards.inspect.page import cases_page, draw_segment, preparation, shards_page
from medsam2.shards.inspect.survey import (
    check_files,
    check_splits,
    equal_voxels,
    inspect_shards,
    overview_table,
    read_histograms,
    repeated_cases,
    structure_table,
    survey_case,
)
from medsam2.shards.inspect.tables import read_tables


def altered(shards: Path, folder: Path, change: Callable[[list[dict[str, Any]]], None], **summary: Any) -> SegmentIndex:
    """The same shards with other rows in their index."""
    shutil.copytree(shards, folder)
    index = read_index(folder)
    rows = index.table.to_pylist()
    change(rows)
    write_index(folder, rows, read_summary(index.folder) | summary)
    return read_index(folder)


def entries(table: Table) -> list[dict[str, Any]]:
    """The rows by the names of the columns."""
    return [dict(zip((column.name for column in table.columns), row, strict=True)) for row in table.rows]


def test_groups_count_patients_cases_and_bytes(shards: Path):
    groups = entries(overview_table(read_index(shards), read_tables(read_index(shards))))
    mine = [e for e in groups if e["dataset"] == "Dataset001_Test"]
    assert sum(e["patients"] for e in mine) == sum(e["cases"] for e in mine) == 4
    assert sum(e["objects"] for e in mine) == 8
    sizes = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert sum(e["MB"] for e in groups) * 1e6 == pytest.approx(sizes)
    assert [e["modality"] for e in groups] == sorted(e["modality"] for e in groups)


def test_structures_are_counted_by_data_set_and_split(shards: Path):
    structures = entries(structure_table(read_tables(read_index(shards))))
    organs = [e for e in structures if (e["dataset"], e["structure"]) == ("Dataset001_Test", "organ")]
    assert sum(e["patients"] for e in organs) == 4
    assert sum(e["frames"] for e in organs) == 4 * 6
    lesion = next(e for e in structures if (e["dataset"], e["structure"]) == ("Dataset001_Test", "lesion"))
    assert lesion["median pixels"] == 24


def test_sound_shards_have_no_problem_and_cut_or_missing_ones_do(shards: Path, tmp_path: Path):
    assert inspect_shards(read_index(shards)).problems == []
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    first, second = sorted(folder.glob("*.tar"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    report = inspect_shards(read_index(folder))
    assert len(report.problems) == 2
    assert f"{first}: missing" in report.problems[0]
    assert "bytes, expected" in report.problems[1]
    assert "could not be read" in report.histogram_note
    page = render(shards_page(report))
    assert "could not be read" in page
    assert f"{first.name}: missing" in page and str(folder) not in page


def test_an_index_for_people_that_is_gone_is_a_problem(shards: Path, tmp_path: Path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    (folder / SUMMARY_FILE).write_text("{")
    index = read_index(folder)
    (problem,) = check_files(index, read_tables(index), read_summary(index.folder))
    assert SUMMARY_FILE in problem


def test_a_patient_in_two_splits_is_a_leak(shards: Path, tmp_path: Path):
    def move(rows: list[dict[str, Any]]) -> None:
        of_one = [r for r in rows if r["dataset"].startswith("recist")]
        patient = max(
            {r["patient"] for r in of_one}, key=lambda p: len({r["case"] for r in of_one if r["patient"] == p})
        )
        next(r for r in of_one if r["patient"] == patient)["split"] = "test"

    (problem,) = check_splits(read_tables(altered(shards, tmp_path / "shards", move)))
    assert re.match(r"leak: recist: patient [0-9a-f]{16} is in te?\w+ and in ", problem)


def same_image(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Two cases of a data set get equal voxels, both in `split` and in train."""
    first, second = [r for r in rows if r["dataset"] == "Dataset001_Test"][:2]
    first["split"], second["split"] = split, "train"
    second["content_hash"] = first["content_hash"]
    return [first, second]


def test_equal_voxels_in_two_splits_are_a_leak_and_in_one_a_warning(shards: Path, tmp_path: Path):
    across = read_tables(altered(shards, tmp_path / "across", lambda rows: same_image(rows, "val") and None))
    (problem,) = check_splits(across)
    assert problem.startswith("leak: equal voxels in two splits: Dataset001_Test ")
    assert "Dataset001_Test val case " in problem and "Dataset001_Test train case " in problem
    assert repeated_cases(across) == []
    report = inspect_shards(altered(shards, tmp_path / "within", lambda rows: same_image(rows, "train") and None))
    assert report.problems == []
    (finding,) = [f for f in report.findings if f.kind == "equal voxels"]
    assert "the same image as Dataset001_Test train case" in finding.what
    assert "the same image as" in render(shards_page(report))


def test_a_scan_under_two_windows_is_no_duplicate(shards: Path, tmp_path: Path):
    def change(rows: list[dict[str, Any]]) -> None:
        first, second = same_image(rows, "train")
        second["patient"], second["window"] = first["patient"], "-1350:150 HU"

    assert equal_voxels(read_tables(altered(shards, tmp_path / "shards", change))) == []


def test_histograms_say_of_how_many_segments_they_are(shards: Path, monkeypatch: pytest.MonkeyPatch):
    index = read_index(shards)
    tables = read_tables(index)
    histograms, note = read_histograms(index, tables)
    assert len(histograms) == len(index)
    assert note.endswith("from all segments.")
    row = index.row(0)
    assert histograms[0].sum() == len(row.frames) * row.height * row.width * row.channels
    monkeypatch.setattr(inspect, "MAX_HISTOGRAMS", 5)
    histograms, note = read_histograms(index, tables)
    assert len(histograms) == 5
    assert f"from 5 of {len(index)} segments" in note


def test_a_black_window_is_found_in_real_shards(tmp_path: Path, write):
    from medsam2.shards.prepare.run import PrepareOptions, prepare

    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    image, _ = write.scan(0)
    write.volume(folder / "imagesTr" / "smith_000_0000.nii.gz", (image - 900).astype(np.int16))
    prepare(folder, tmp_path / "shards", PrepareOptions())
    kinds = {f.kind: f for f in inspect_shards(read_index(tmp_path / "shards")).findings}
    assert "--window lung" in kinds["suspicious window"].remedy


def test_a_case_is_surveyed_with_its_shape_spacing_and_labels(raw_folder: Path):
    survey = survey_case(find_cases(raw_folder)[0])
    assert (survey.shape, survey.spacing, survey.labels) == ("12 x 40 x 48 int16", "4 x 1 x 1 mm", "organ, lesion")


def test_a_broken_case_is_surveyed_by_its_error(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    (folder / "imagesTr" / "smith_000_0000.nii.gz").write_bytes(b"no scan")
    assert "no NIfTI header" in survey_case(find_cases(folder)[0]).error


def test_pages_are_self_contained_and_name_no_patient(shards: Path, raw_folder: Path):
    refs = find_cases(raw_folder)
    pages = [shards_page(inspect_shards(read_index(shards))), cases_page(refs, [survey_case(ref) for ref in refs])]
    for page in map(render, pages):
        assert "smith" not in page
        assert "CT_Lesion" not in page
        assert str(raw_folder) not in page and str(shards) not in page
        assert not re.search(r'(src|href)="(?!data:|#)', page)
        assert not re.search(r"url\((?!data:)|@import|<script|<link", page)
        pictures = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page)
        assert len(pictures) >= 11
        assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).mode == "RGB"


def test_the_page_says_where_datasets_come_from(shards: Path, tmp_path: Path):
    index = altered(
        shards, tmp_path / "shards", lambda rows: None,
        datasets={"echo": {"source": "https://example.org/echo", "licence": "CC BY <4.0>", "layout": "davis_frames"}},
    )  # fmt: skip
    page = render(shards_page(inspect_shards(index)))
    assert "CC BY &lt;4.0&gt;" in page and "davis_frames" in page and "https://example.org/echo" in page
    assert "-160:240 HU" in page


def test_an_index_that_names_a_file_elsewhere_is_a_problem_and_the_file_is_not_read(shards: Path, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 100_000)

    def lead_out(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["shard"] = "../secret"

    report = inspect_shards(altered(shards, tmp_path / "shards", lead_out))
    assert any("../secret: the index names a file outside its folder" in problem for problem in report.problems)
    with pytest.raises(UserError, match="not the plain name of a .tar"):
        draw_segment(report.index, 0)


def test_a_page_lists_warnings_with_what_to_do(shards: Path, tmp_path: Path):
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["spacing"] = [500.0, 1.0, 1.0] if row["kind"] == "volume" else row["spacing"]

    report = inspect_shards(altered(shards, tmp_path / "shards", change))
    page = render(shards_page(report))
    spaced = [f for f in report.findings if f.kind == "extreme spacing"]
    assert len(spaced) == 7
    assert all(f.case in page for f in spaced)
    assert "compare with the header of the source" in page


def test_what_prepare_was_told_is_shown_as_yaml_without_what_is_empty():
    settings = {"common": {"window": "lung", "keep": ["liver", "spleen"]}}
    configuration = {"max_side": 1024, "settings": settings}
    shown = preparation({"configuration": configuration, "datasets": {}, "failed_cases": 2})
    assert yaml.safe_load(shown) == {"configuration": configuration, "failed_cases": 2}
    assert preparation({}) == ""
