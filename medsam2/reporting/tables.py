"""One table for the terminal, Markdown, LaTeX and (by `page`) HTML.

    table = Table("Scores", (*words("modality", "structure"), *numbers("cases", "DSC")), (("CT", "liver", 12, 0.91),))
    print_table(table); to_markdown(table); to_latex(table, "scores")

The terminal shows every number in full at any width. If the columns do not fit, it leaves out columns with one value
throughout, then those with the highest `drop`, and names them below the table; then it shortens long names in the
middle. If even that does not fit, each row becomes a short paragraph.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

MIN_WORDS_WIDTH = 10  # characters; names are not shortened further
MAX_LATEX_COLUMNS = 10  # wider tables are set in a small font
COLUMN_GAP = 2  # characters, on the terminal
MISSING = "-"
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "†": r"$\dagger$", "‡": r"$\ddagger$", "→": r"$\to$", "±": r"$\pm$", "…": r"\ldots{}", "−": "$-$", "\n": " ",
}  # fmt: skip

Cell = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: the heading; it may hold a line break.
        numeric: aligned right and never wrapped; otherwise words, which wrap at spaces.
        digits: decimals of a float.
        drop: a narrow terminal leaves out columns with the highest number first, and never those with 0.
    """

    name: str
    numeric: bool = False
    digits: int = 3
    drop: int = 0

    def text(self, cell: Cell) -> str:
        """Format a cell; a missing value is a dash."""
        if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
            return MISSING
        if isinstance(cell, float):
            return f"{cell:,.{self.digits}f}"
        return cell if isinstance(cell, str) else f"{cell:,}"


def words(*names: str, drop: int = 0) -> tuple[Column, ...]:
    """Make columns of words, aligned left."""
    return tuple(Column(name, drop=drop) for name in names)


def numbers(*names: str, digits: int = 3, drop: int = 0) -> tuple[Column, ...]:
    """Make columns of numbers, aligned right."""
    return tuple(Column(name, True, digits, drop) for name in names)


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    Attributes:
        rows: one cell per column: text, an integer (1,234), a float (with the column's decimals) or None (a dash).
        totals: indices of the rows of totals, which are bold. notes: explanations below the table.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    totals: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> list[list[str]]:
        """The rows as text."""
        return [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]


# ------------------------------------------------------------------------------------------------------- terminal


def print_table(table: Table, console: Console | None = None) -> None:
    """Print the table as wide as the terminal (into a pipe: `COLUMNS`, by default 80)."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = console or Console()
    lines = table.lines
    widths, remarks = _layout(table, lines, console.width)
    console.print(table.title, style="bold", highlight=False, markup=False)
    if _total_width(widths) > console.width:
        remarks = []
        for line in lines:
            cells = [
                f"{_flat(c.name)} {text}" if c.numeric else text for c, text in zip(table.columns, line, strict=True)
            ]
            console.print("- " + ", ".join(cells), highlight=False, markup=False)
    else:
        rich_table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, COLUMN_GAP - 1, 0, 0))
        for place, width in widths.items():
            column = table.columns[place]
            rich_table.add_column(escape(column.name), justify="right" if column.numeric else "left", width=width)
        for number, line in enumerate(lines):
            cells = [
                " ".join(shorten(word, width) for word in line[place].split(" ")) for place, width in widths.items()
            ]
            rich_table.add_row(*map(escape, cells), style="bold" if number in table.totals else None)
        console.print(rich_table, highlight=False)
    for remark in (*remarks, *table.notes):
        console.print(remark, style="dim", highlight=False, markup=False)
    console.print()


def shorten(text: str, width: int) -> str:
    """Shorten text to `width` characters in the middle, since names differ at their ends.

    >>> shorten("hippocampus_023", 9)
    'hipp…_023'
    """
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _layout(table: Table, lines: Sequence[Sequence[str]], width: int) -> tuple[dict[int, int], list[str]]:
    """Widths of the shown columns by index, and remarks on the others.

    Columns are left out until the others can fit into `width`; then the widest columns of words are narrowed.
    """
    widths, min_widths = {}, {}
    for place, column in enumerate(table.columns):
        widths[place] = max(map(len, ["-", *column.name.split(), *(line[place] for line in lines)]))
        min_widths[place] = widths[place] if column.numeric else min(widths[place], MIN_WORDS_WIDTH)
    constant = [place for place in widths if len(lines) > 1 and len({line[place] for line in lines}) == 1]
    droppable = [place for place, column in enumerate(table.columns) if column.drop]
    remarks, left_out = [], []
    for place in [*constant, *sorted(droppable, key=lambda place: -table.columns[place].drop)]:
        if place not in widths or _total_width(min_widths) <= width:
            continue
        del widths[place], min_widths[place]
        if place in constant:
            remarks.append(f"{_flat(table.columns[place].name)}: {lines[0][place]} in every row.")
        else:
            left_out.append(_flat(table.columns[place].name))
    while _total_width(widths) > max(width, _total_width(min_widths)):
        widths[max(widths, key=lambda place: widths[place] - min_widths[place])] -= 1
    return widths, remarks + ([f"Not shown at this width: {', '.join(left_out)}."] if left_out else [])


def _total_width(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + COLUMN_GAP * (len(widths) - 1)


def _flat(text: str) -> str:
    return " ".join(text.split())


# ----------------------------------------------------------------------------------------------- Markdown and LaTeX


def to_markdown(table: Table) -> str:
    """Format the table in Markdown, under a heading and with its notes."""
    alignment = ["--:" if column.numeric else ":--" for column in table.columns]
    rows = [[_escape_markdown(column.name) for column in table.columns], alignment]
    for place, line in enumerate(table.lines):
        mark = "**" if place in table.totals else ""
        rows.append([f"{mark}{_escape_markdown(cell)}{mark}" for cell in line])
    pipes = [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"\n{_escape_markdown(note)}" for note in table.notes]
    return "\n".join([f"## {_escape_markdown(table.title)}", "", *pipes, *notes]) + "\n"


def _escape_markdown(text: str) -> str:
    """Escape Markdown and join lines."""
    return re.sub(r"([|*_<>`\\])", r"\\\1", _flat(text))


def to_latex(table: Table, label: str) -> str:
    """Format the table in LaTeX with booktabs; refer to it with \\ref{tab:LABEL}."""
    rows = [" & ".join(escape_latex(column.name) for column in table.columns) + r" \\", r"\midrule"]
    for place, line in enumerate(table.lines):
        bold = place in table.totals
        if bold and place and place - 1 not in table.totals:
            rows.append(r"\midrule")
        cells = [f"\\textbf{{{escape_latex(cell)}}}" if bold else escape_latex(cell) for cell in line]
        rows.append(" & ".join(cells) + r" \\")
    caption = ". ".join(text.rstrip(".") for text in (table.title, *table.notes)) + "."
    alignment = "".join("r" if column.numeric else "l" for column in table.columns)
    return "\n".join([
        r"\begin{table}", r"\centering", *([r"\scriptsize"] if len(table.columns) > MAX_LATEX_COLUMNS else []),
        f"\\caption{{{escape_latex(caption)}}}", f"\\label{{tab:{re.sub(r'[^a-zA-Z0-9-]', '-', label)}}}",
        f"\\begin{{tabular}}{{{alignment}}}", r"\toprule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def escape_latex(text: str) -> str:
    """Escape text for LaTeX. `{}` goes before an initial bracket, since `\\\\ [` would read it as a length."""
    escaped = re.sub(r"(?<![\w.])-(?=\d)", "$-$", "".join(LATEX.get(letter, letter) for letter in text))
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped
