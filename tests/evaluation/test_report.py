"""Tables in every written form: what is escaped, what is bold, what is marked."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ElementTree
from shutil import which
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medsam2.evaluation.plots import draw_boxes, to_svg
from medsam2.evaluation.report import spread
from medsam2.evaluation.tables import (
    Table,
    change_text,
    comparison_table,
    escape_latex,
    number,
    score_table,
    size_table,
    speed_table,
    to_latex,
    to_markdown,
    to_rich,
)

AWKWARD = "a_b & 50% $x$ {#1} ~^ \\ <c>"


def _group(modality: str, structure: str, dataset: str = "demo") -> dict[str, Any]:
    each = {"before": 0.5, "after": 0.75}
    return {
        "dataset": dataset, "modality": modality, "structure": structure, "cases": 3, "patients": 2, "leaks": 1,
        "dsc": each, "nsd": {"before": None, "after": 0.25}, "absent_empty": each, "seconds": each,
        "frames_per_second": each, "peak_mb": {"before": 100.4, "after": None},
        "dsc_change": {"from": "before", "to": "after", "mean": 0.25, "low": 0.2, "high": 0.3},
    }  # fmt: skip


def _summary(outside: dict[str, str], leaks: int = 0) -> dict[str, Any]:
    groups = [_group("CT", "liver"), _group("CT", "all", "all"), _group("all", "all", "all")]
    entry = {"protocol": {"name": "box"}, "outside": outside, "groups": groups}
    return {"checkpoints": ["before", "after"], "leaks": {"before": 0, "after": leaks}, "protocols": [entry]}


def test_scores_stand_under_their_checkpoint_and_totals_are_bold() -> None:
    summary = _summary({})
    table = score_table(summary, summary["protocols"][0])
    assert table.header[:2] == ("modality", "structure") and "leak" not in table.header
    line = dict(zip(table.header, table.lines[0], strict=True))
    assert line["DSC\nbefore"] == "0.500" and line["NSD\nbefore"] == "-" and line["NSD\nafter"] == "0.250"
    assert line["change in DSC\n[95 %]"] == "+0.250 [+0.200, +0.300]"
    assert table.totals == (False, True, True)
    assert "**0.500**" in to_markdown(table).splitlines()[-1]
    assert r"\textbf{0.500}" in to_latex(table, "x") and to_latex(table, "x").count(r"\midrule") == 2
    assert to_rich(table).row_count == 3


def test_leaks_and_prompts_outside_of_training_are_marked_at_the_checkpoint() -> None:
    summary = _summary({"before": "box uses boxes"}, leaks=1)
    header = score_table(summary, summary["protocols"][0]).header
    assert "DSC\nbefore†" in header and "DSC\nafter‡" in header and header[-1] == "leak"


def test_latex_is_escaped_and_sets_every_cell() -> None:
    table = Table(AWKWARD, ("name\nof it", "value"), ((AWKWARD, "[0.1, 0.2]"), ("†", "-")), 1, (), (AWKWARD,))
    text = to_latex(table, "my label_1")
    assert "{}[0.1, 0.2]" in text and r"\label{tab:my-label-1}" in text and "name of it & value" in text
    bare = re.sub(r"\\[&%$#_{}]|\\[a-z]+(\{\})?|\$\\dagger\$", "", text)
    assert not re.search(r"[%#_~^$†]", bare)
    assert text.count(r" \\") == 3 and all(
        line.count(" & ") == 1 for line in text.splitlines() if line.endswith(r" \\")
    )


@pytest.mark.skipif(which("pdflatex") is None, reason="LaTeX is not installed")
def test_latex_compiles(tmp_path) -> None:  # type: ignore[no-untyped-def]
    table = Table(AWKWARD, ("name", "value"), ((AWKWARD, "[0.1, 0.2]"),), 1, (True,), (AWKWARD,))
    head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "a.tex").write_text(head + to_latex(table, "x") + "\\end{document}\n")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "a.tex"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_markdown_cells_hold_no_markup_and_rows_have_one_width() -> None:
    table = Table("a|b", ("x\ny", "z"), (("p|q", "1"), ("*r*", "2")), 1)
    lines = to_markdown(table).splitlines()
    assert lines[0] == r"## a\|b" and lines[4] == r"| p\|q | 1 |" and lines[5] == r"| \*r\* | 2 |"
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[2:]} == {3}
    assert lines[3] == "| :-- | --: |"


def test_a_comparison_names_its_part_pair_and_verdict() -> None:
    test = {
        "by": "size", "modality": "all", "structure": "all", "size": "small", "score": "hd95", "from": "a", "to": "b",
        "patients": 9, "mean": -1.5, "low": -2.0, "high": -1.0, "better": 0.875, "p": 0.004, "p_holm": 0.0123,
        "verdict": "better",
    }  # fmt: skip
    missing = {**test, "by": "all", "size": "all", "low": None, "high": None, "p": None, "p_holm": None}
    few = {**missing, "by": "structure", "structure": "liver"}
    table = comparison_table({"protocol": {"name": "box"}, "comparisons": [test, missing, few]})
    assert len(table.lines) == 2 and table.notes[-1].startswith("1 smaller parts have too few patients")
    assert table.lines[0] == (
        "small objects", "HD95", "a → b", "9", "-1.50 [-2.00, -1.00]", "0.88", "0.004", "0.012", "better",
    )  # fmt: skip
    assert table.lines[1][0] == "all" and table.lines[1][4:8] == ("-1.50", "0.88", "-", "-")


def test_small_and_large_objects_have_a_table_where_there_are_enough_of_them() -> None:
    summary = _summary({})
    entry = summary["protocols"][0]
    for group in entry["groups"]:
        group["sizes"] = []
    assert size_table(summary, entry) is None
    change = {"mean": 0.1, "low": 0.05, "high": 0.2}
    entry["groups"][0]["sizes"] = [
        {"size": "small", "objects": 3, "dsc": {"before": 0.2, "after": 0.3}, "dsc_change": change}
    ]
    table = size_table(summary, entry)
    assert table is not None and table.totals == (False,)
    assert table.lines[0][2:] == ("liver", "small", "3", "0.200", "0.300", "+0.100 [+0.050, +0.200]")


def test_speed_is_that_of_all_cases() -> None:
    table = speed_table(_summary({}))
    assert table.lines == (("box", "before", "0.50", "0.50", "100"), ("box", "after", "0.75", "0.75", "-"))


def test_what_is_not_known_is_a_dash() -> None:
    assert number(None) == number(float("nan")) == "-" and number(0.12345, 2) == "0.12"
    assert change_text(None) == "-"
    assert change_text({"mean": -0.1, "low": None, "high": None}) == "-0.100"
    assert escape_latex("[x]") == "{}[x]"


def test_box_plots_show_every_structure_and_checkpoint_and_are_reproducible() -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        [
            {"modality": "CT", "structure": name, "checkpoint": label, "dsc": rng.uniform()}
            for name in ("liver", "a & b")
            for label in ("before", "after")
            for _ in range(5)
        ]
    )
    rows.loc[0, "dsc"] = float("nan")
    content = to_svg(draw_boxes(rows, ["before", "after"]))
    words = "".join(ElementTree.fromstring(content).itertext())
    assert all(word in words for word in ("liver", "a & b", "5 objects", "before", "after", "DSC"))
    assert content == to_svg(draw_boxes(rows, ["before", "after"]))


def test_box_plots_of_one_object_are_a_dot() -> None:
    rows = pd.DataFrame([{"modality": "CT", "structure": "liver", "checkpoint": "nano", "dsc": 0.5}])
    assert b"1 object<" in to_svg(draw_boxes(rows, ["nano"]))


def test_a_page_shows_so_many_pictures_from_everywhere() -> None:
    for count in range(60):
        shown = spread(list(range(count)), 24)
        assert len(shown) <= 24 and shown[:1] == [0][:count] and (count > 24 or len(shown) == count)
        assert count <= 24 or (len(shown) > 12 and shown[-1] >= count - 3)
