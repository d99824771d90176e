"""One table in every written form: the terminal, Markdown, LaTeX and (by `page`) HTML.

    table = Table("Scores", (*words("modality", "structure"), *numbers("cases", "DSC")), (("CT", "liver", 12, 0.91),))
    print_table(table); to_markdown(table); to_latex(table, "scores")

The terminal shows every number whole at any width. Where the columns do not fit it leaves out those that hold one value
throughout (and says which), then those with the highest `drop` (and says so), and shortens long names in the middle.
Where even that does not fit, each row becomes a short paragraph.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

MIN_WORDS_WIDTH = 10  # characters: names are not shortened further
MAX_LATEX_COLUMNS = 10  # wider tables are set in a small font
GAP = 2  # characters between two columns of the terminal
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
        numeric: set to the right and never broken; else words, which wrap at spaces.
        digits: decimals of a float.
        drop: a narrow terminal leaves out the columns with the highest number first; 0 stays.
    """

    name: str
    numeric: bool = False
    digits: int = 3
    drop: int = 0

    def text(self, cell: Cell) -> str:
        """The cell as it is shown; a dash for what is not known."""
        if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
            return MISSING
        if isinstance(cell, float):
            return f"{cell:,.{self.digits}f}"
        return f"{cell:,}" if isinstance(cell, int) else cell


def words(*names: str, drop: int = 0) -> tuple[Column, ...]:
    """Columns of words, set to the left."""
    return tuple(Column(name, drop=drop) for name in names)


def numbers(*names: str, digits: int = 3, drop: int = 0) -> tuple[Column, ...]:
    """Columns of numbers, set to the right."""
    return tuple(Column(name, True, digits, drop) for name in names)


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    Attributes:
        rows: a cell a column: text, an integer (1,234), a float (with the column's decimals) or None (a dash).
        totals: the places of rows that are totals, which are set bold. notes: what one must know to read it.
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
    """Print the table, as wide as the terminal (80 columns into a pipe unless COLUMNS says otherwise)."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = console or Console()
    lines = table.lines
    shown, remarks = _shown_columns(table, lines, console.width)
    widths = _widths(table, lines, shown, console.width)
    console.print(f"[bold]{escape(table.title)}[/bold]", highlight=False)
    if widths is None:
        remarks = []
        _print_paragraphs(table, lines, console)
    else:
        drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for place, width in zip(shown, widths, strict=True):
            column = table.columns[place]
            drawn.add_column(escape(column.name), justify="right" if column.numeric else "left", width=width)
        for number, line in enumerate(lines):
            cells = [escape(_fit(line[place], width)) for place, width in zip(shown, widths, strict=True)]
            last = (number + 1 in table.totals) and number not in table.totals
            drawn.add_row(*cells, style="bold" if number in table.totals else None, end_section=last)
        console.print(drawn, highlight=False)
    for remark in (*remarks, *table.notes):
        console.print(remark, style="dim", highlight=False, markup=False)
    console.print()


def shorten(text: str, width: int) -> str:
    """At most `width` characters, left out in the middle, since names differ at their ends.

    >>> shorten("hippocampus_023", 9)
    'hipp…_023'
    """
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _fit(text: str, width: int) -> str:
    """Words that are longer than the column are shortened; lines break between words."""
    return " ".join(shorten(word, width) for word in text.split(" "))


def _shown_columns(table: Table, lines: Sequence[Sequence[str]], width: int) -> tuple[list[int], list[str]]:
    """The columns that fit, and what must be said of the others."""
    shown, remarks, left_out = list(range(len(table.columns))), list[str](), list[str]()
    for place, column in enumerate(table.columns):
        values = {line[place] for line in lines}
        if _least(table, lines, shown) > width and len(lines) > 1 and len(values) == 1:
            shown.remove(place)
            remarks.append(f"{_flat(column.name)}: {values.pop()} in every row.")
    while _least(table, lines, shown) > width and any(table.columns[place].drop for place in shown):
        dropped = max(shown, key=lambda place: table.columns[place].drop)
        shown.remove(dropped)
        left_out.append(_flat(table.columns[dropped].name))
    if left_out:
        remarks.append(f"Not shown at this width: {', '.join(left_out)}.")
    return shown, remarks


def _least(table: Table, lines: Sequence[Sequence[str]], shown: Sequence[int]) -> int:
    """The width, in characters, below which the columns `shown` cannot go."""
    widths = [_natural(table, lines, place) for place in shown]
    widths = [w if table.columns[p].numeric else min(w, MIN_WORDS_WIDTH) for p, w in zip(shown, widths, strict=True)]
    return sum(widths) + GAP * (len(shown) - 1)


def _natural(table: Table, lines: Sequence[Sequence[str]], place: int) -> int:
    """The width of the widest cell of a column and of the longest word of its heading."""
    return max([len(line[place]) for line in lines] + [len(word) for word in table.columns[place].name.split()] + [1])


def _widths(table: Table, lines: Sequence[Sequence[str]], shown: Sequence[int], width: int) -> list[int] | None:
    """The width of each column: the widest words give way first. None where the columns do not fit."""
    if _least(table, lines, shown) > width:
        return None
    widths = [_natural(table, lines, place) for place in shown]
    while sum(widths) + GAP * (len(shown) - 1) > width:
        flexible = [i for i, place in enumerate(shown) if not table.columns[place].numeric]
        widest = max(flexible, key=lambda i: widths[i])
        widths[widest] -= 1
    return widths


def _print_paragraphs(table: Table, lines: Sequence[Sequence[str]], console: Console) -> None:
    for line in lines:
        pairs = list(zip(table.columns, line, strict=True))
        heads = [text for column, text in pairs if not column.numeric]
        values = [f"{_flat(column.name)} {text}" for column, text in pairs if column.numeric]
        console.print(" · ".join(heads), style="bold", highlight=False, markup=False)
        if values:
            console.print(f"  {', '.join(values)}", highlight=False, markup=False)


def _flat(text: str) -> str:
    return " ".join(text.split())


# ----------------------------------------------------------------------------------------------- Markdown and LaTeX


def to_markdown(table: Table) -> str:
    """A pipe table under a heading, with its notes."""
    sides = ["--:" if column.numeric else ":--" for column in table.columns]
    rows = [[_escape_markdown(column.name) for column in table.columns], sides]
    for place, line in enumerate(table.lines):
        mark = "**" if place in table.totals else ""
        rows.append([f"{mark}{_escape_markdown(cell)}{mark}" for cell in line])
    pipes = [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"\n{_escape_markdown(note)}" for note in table.notes]
    return "\n".join([f"## {_escape_markdown(table.title)}", "", *pipes, *notes]) + "\n"


def _escape_markdown(text: str) -> str:
    """One line, without what Markdown takes for markup."""
    return re.sub(r"([|*_<>`\\])", r"\\\1", _flat(text))


def to_latex(table: Table, label: str) -> str:
    """A booktabs table; `label` is what \\ref{tab:LABEL} finds."""
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
    """Text that LaTeX sets as it stands; what begins with a bracket is guarded, since `\\\\ [` reads it as a length."""
    escaped = re.sub(r"(?<![\w.])-(?=\d)", "$-$", "".join(LATEX.get(letter, letter) for letter in text))
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped
