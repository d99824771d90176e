"""Tables in every written form: what is escaped, what is bold, and that a terminal of any width shows each number."""

from __future__ import annotations

import io
import re
import subprocess
from pathlib import Path
from shutil import which

import pytest
from rich.console import Console

from medsam2.reporting.tables import (
    Column,
    Table,
    escape_latex,
    numbers,
    print_table,
    shorten,
    to_latex,
    to_markdown,
    words,
)

AWKWARD = "a_b & 50% $x$ {#1} ~^ \\ <c> [bold]"
NAMES = ("MRI_hippocampus_aedf", "anterior_hippocampus_left")
WIDE = Table(
    "box: scores",
    (*words("data set", "structure", "checkpoint"), *numbers("cases", "patients", drop=1), *numbers("DSC"),
     Column("change\n[95 %]", True), *numbers("NSD", "empty", drop=2)),
    tuple((*NAMES, label, 1234, 12, dsc, "+0.068 [+0.010, +0.110]", None, float("nan"))
          for label, dsc in (("nano", 0.9104), ("fine_tuned_with_a_long_name", 0.25), ("lora", 0.5))),
    frozenset({2}),
    ("Means over patients.",),
)  # fmt: skip


def printed(table: Table, width: int) -> str:
    file = io.StringIO()
    print_table(table, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 160])
def test_a_terminal_of_any_width_shows_scores_whole(width: int) -> None:
    text = printed(WIDE, width)
    assert max(map(len, text.splitlines())) <= width
    together = " ".join(text.split())
    for whole in ("0.910", "0.250", "0.500", "+0.068 [+0.010, +0.110]", "Means over patients."):
        assert whole in together, whole
    assert "0.…" not in text


def test_what_does_not_fit_is_named() -> None:
    narrow = Table(WIDE.title, WIDE.columns, (*WIDE.rows, ("other", "liver", "nano", 1, 2, 0.5, None, 0.1, 0.2)))
    text = " ".join(printed(narrow, 68).split())
    assert "Not shown at this width: NSD, empty, cases, patients." in text
    assert f"data set: {NAMES[0]} in every row." in " ".join(printed(WIDE, 80).split())
    assert "Not shown" not in printed(WIDE, 160) and "1,234" in printed(WIDE, 160)


def test_long_names_are_shortened_in_the_middle_and_prose_wraps() -> None:
    assert shorten("hippocampus_023", 9) == "hipp…_023" and shorten("short", 9) == "short"
    reason = "the file could not be read since it is gone " * 3
    text = printed(Table("Failures", words("case", "reason"), ((f"hippocampus_{'x' * 80}_023", reason),)), 80)
    assert " ".join(text.split()).count("gone") == 3 and "_023" in text


def test_unknown_values_are_dashes_and_counts_have_separators() -> None:
    assert WIDE.lines[0][3:] == ["1,234", "12", "0.910", "+0.068 [+0.010, +0.110]", "-", "-"]
    assert Column("HD95", digits=2).text(1.234) == "1.23"


def test_totals_are_bold_in_markdown_and_latex() -> None:
    assert "**0.500**" in to_markdown(WIDE) and "**0.250**" not in to_markdown(WIDE)
    latex = to_latex(WIDE, "scores")
    assert r"\textbf{0.500}" in latex and latex.count(r"\midrule") == 2


def test_markdown_cells_hold_no_markup_and_rows_have_one_width() -> None:
    table = Table("a|b", (*words("x\ny"), *numbers("z")), (("p|q", 1), ("*r*", 2)))
    lines = to_markdown(table).splitlines()
    assert lines[0] == r"## a\|b" and lines[4] == r"| p\|q | 1 |" and lines[5] == r"| \*r\* | 2 |"
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[2:]} == {3}
    assert lines[3] == "| :-- | --: |"


def test_latex_is_escaped_and_sets_every_cell() -> None:
    columns = (*words("name\nof it"), *numbers("value"))
    table = Table(AWKWARD, columns, ((AWKWARD, "[0.1, 0.2]"), ("†", None)), frozenset(), (AWKWARD,))
    text = to_latex(table, "my label_1")
    assert "{}[0.1, 0.2]" in text and r"\label{tab:my-label-1}" in text and "name of it & value" in text
    bare = re.sub(r"\\[&%$#_{}]|\\[a-z]+(\{\})?|\$\\dagger\$", "", text)
    assert not re.search(r"[%#_~^$†]", bare)
    ends = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(ends) == 3 and all(line.count(" & ") == 1 for line in ends)
    assert escape_latex("[x]") == "{}[x]"


@pytest.mark.skipif(which("pdflatex") is None, reason="LaTeX is not installed")
def test_latex_compiles(tmp_path: Path) -> None:
    table = Table(AWKWARD, (*words("name"), *numbers("value")), ((AWKWARD, "[0.1, 0.2]"),), frozenset({0}), (AWKWARD,))
    head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "a.tex").write_text(head + to_latex(table, "x") + "\\end{document}\n")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "a.tex"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout
