"""Tables of an evaluation as text cells, and how they are written: for the terminal, Markdown, LaTeX and the page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medsam2.evaluation.comparison import p_text
from medsam2.evaluation.summary import SCORES, TOTAL

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table as RichTable

OUTSIDE, LEAK = "†", "‡"
NAMES = {
    "dsc": "DSC", "iou": "IoU", "nsd": "NSD", "hd95": "HD95", "assd": "ASSD", "volume_error": "volume error", "j": "J",
    "f": "F", "jf": "J&F", "cldice": "clDice", "instance_f1": "instance F1", "present_dsc": "DSC present",
    "present_iou": "IoU present", "prompt_dsc": "DSC prompted", "other_dsc": "DSC elsewhere", "absent_empty": "empty",
    "volume_error_abs": "|volume error|", "noc85": "NoC@85", "noc90": "NoC@90",
    "dsc_case": "DSC by case", "iou_case": "IoU by case", "dsc_pooled": "DSC pooled", "iou_pooled": "IoU pooled",
}  # fmt: skip
WIDE = 10  # columns, from which LaTeX sets a table small
DISTANCES = ("hd95", "assd")
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "†": r"$\dagger$", "‡": r"$\ddagger$", "→": r"$\to$", "±": r"$\pm$", "…": r"\ldots{}", "−": "$-$", "\n": " ",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        header: may hold line breaks. texts: so many columns from the left are words, the others numbers.
        totals: which lines are totals (bold). notes: what must be known to read it.
    """

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    texts: int = 1
    totals: tuple[bool, ...] = ()
    notes: tuple[str, ...] = ()

    def is_total(self, line: int) -> bool:
        """Whether this line is a total."""
        return line < len(self.totals) and self.totals[line]


# ------------------------------------------------------------------------------------------------------- contents


def marked(label: str, entry: Mapping[str, Any], leaks: Mapping[str, int]) -> str:
    """The label of a checkpoint, with a mark where the protocol is outside its training and where cases leak."""
    return label + (OUTSIDE if label in entry["outside"] else "") + (LEAK if leaks.get(label) else "")


def score_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table:
    """Each group: DSC and NSD of each checkpoint, the change in DSC, and how well absence is seen.

    Args:
        entry: one of `summary["protocols"]`.
    """
    labels, groups, leaks = summary["checkpoints"], entry["groups"], summary["leaks"]
    pairs = {(g["dataset"], g["modality"]) for g in groups if TOTAL not in (g["dataset"], g["modality"])}
    several = len(pairs) > len({modality for _, modality in pairs})  # else the modality says it
    shown = {label: marked(label, entry, leaks) for label in labels}
    header = [*(["data set"] if several else []), "modality", "structure"]
    texts = len(header)
    header += ["cases", "patients", *(f"DSC\n{shown[label]}" for label in labels)]
    header += ["change in DSC\n[95 %]"] if len(labels) > 1 else ["[95 %]"]
    header += [f"{name}\n{shown[label]}" for name in ("NSD", "empty") for label in labels]
    header += ["leak"] if any(leaks.values()) else []
    lines = []
    for group in groups:
        cells = [group["dataset"]] if several else []
        cells += [group["modality"], group["structure"], str(group["cases"]), str(group["patients"])]
        cells += [number(group["dsc"][label]) for label in labels]
        cells += [change_text(group["dsc_change"])] if len(labels) > 1 else [_interval(group, labels[0])]
        cells += [number(group[name][label]) for name in ("nsd", "absent_empty") for label in labels]
        lines.append(tuple(cells + ([str(group["leaks"])] if any(leaks.values()) else [])))
    totals = tuple(group["structure"] == TOTAL for group in groups)
    return Table(f"{entry['protocol']['name']}: scores", tuple(header), tuple(lines), texts, totals)


def metric_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table:
    """Every score that was computed: a line a group and checkpoint."""
    labels, groups = summary["checkpoints"], entry["groups"]
    names = [name for name in (*SCORES, "dsc_case", "iou_case", "dsc_pooled", "iou_pooled") if _any(groups, name)]
    lines, totals = [], []
    for group in groups:
        for label in labels:
            values = [number(group[name][label], 2 if name in DISTANCES else 3) for name in names]
            lines.append((group["dataset"], group["modality"], group["structure"], label, *values))
            totals.append(group["structure"] == TOTAL)
    header = ("data set", "modality", "structure", "checkpoint", *(NAMES.get(name, name) for name in names))
    notes = ("HD95 and ASSD in mm for volumes, in pixels for clips and stills. Scores are means over patients.",)
    return Table(f"{entry['protocol']['name']}: all scores", header, tuple(lines), 4, tuple(totals), notes)


def size_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table | None:
    """DSC by size of the object; None where there are too few objects for classes."""
    labels = summary["checkpoints"]
    lines = [
        (group["dataset"], group["modality"], group["structure"], size["size"], str(size["objects"]))
        + tuple(number(size["dsc"][label]) for label in labels)
        + ((change_text(size["dsc_change"]),) if len(labels) > 1 else (_interval(size, labels[0]),))
        for group in entry["groups"]
        for size in group["sizes"]
    ]
    if not lines:
        return None
    header = ("data set", "modality", "structure", "size", "objects", *(f"DSC\n{label}" for label in labels))
    header += ("change in DSC\n[95 %]" if len(labels) > 1 else "[95 %]",)
    totals = tuple(line[2] == TOTAL for line in lines)
    notes = ("Sizes are terciles of the true volume within data set, modality and structure.",)
    return Table(f"{entry['protocol']['name']}: by size", header, tuple(lines), 4, totals, notes)


def comparison_table(entry: Mapping[str, Any]) -> Table:
    """The paired tests between checkpoints (`comparison`); parts with too few patients for one are counted."""
    lines, totals = [], []
    tested = [test for test in entry["comparisons"] if test["p"] is not None or test["by"] == TOTAL]
    for test in tested:
        digits = 2 if test["score"] in DISTANCES else 3
        change = f"{test['mean']:+.{digits}f}"
        if test["low"] is not None:
            change += f" [{test['low']:+.{digits}f}, {test['high']:+.{digits}f}]"
        share, p, holm = number(test["better"], 2), p_text(test["p"]), p_text(test["p_holm"])
        pair = f"{test['from']} → {test['to']}"
        of = (_part_name(test), NAMES.get(test["score"], test["score"]), pair, str(test["patients"]))
        lines.append((*of, change, share, p, holm, test["verdict"]))
        totals.append(test["by"] == TOTAL)
    header = ("part", "score", "checkpoints", "patients", "change\n[95 %]", "share\nbetter", "p", "p\nHolm", "verdict")
    notes: tuple[str, ...] = (
        "Sign-flip permutation test over patients, two-sided; Holm's correction within each kind of part and score. "
        "Share better: of the patients who gain.",
    )
    untested = len(entry["comparisons"]) - len(tested)
    notes += (f"{untested} smaller parts have too few patients for a test; see summary.json.",) if untested else ()
    return Table(f"{entry['protocol']['name']}: differences", header, tuple(lines), 3, tuple(totals), notes)


def _part_name(test: Mapping[str, Any]) -> str:
    words = [test[name] for name in ("modality", "structure", "size") if test[name] != TOTAL]
    return " ".join(words) + (" objects" if test["by"] == "size" else "") if words else TOTAL


def worst_table(rows: pd.DataFrame, label: str, most: int) -> Table:
    """The objects of one protocol on which a checkpoint does worst."""
    lines = []
    for row in rows[rows["checkpoint"] == label].sort_values("dsc", kind="stable").head(most).to_dict("records"):
        frames = f"{row['prompt_frames']} ({number(row['prompt_dsc'])})"
        lines.append((
            row["modality"], row["structure"], row["dataset"], row["case"], number(row["dsc"]), number(row["nsd"]),
            frames, number(row["other_dsc"]),
        ))  # fmt: skip
    header = ("modality", "structure", "data set", "case", "DSC", "NSD", "prompted frames (DSC)", "DSC elsewhere")
    return Table(f"Lowest DSC of {label}", header, tuple(lines), 4)


def checkpoint_table(summary: Mapping[str, Any]) -> Table:
    """What stands of each checkpoint, the leak check among it."""
    lines = []
    for model in summary["models"]:
        leaks = summary["leaks"][model["label"]]
        leak = f"{leaks} cases were trained on" if leaks else "none of these cases was trained on"
        leak = leak if model["records_cases"] else "unknown: the file does not say what it was trained on"
        size = f"{model['image_size']} px"
        lines.append((model["label"], model["name"], model["model"], size, model["weights"], leak))
    header = ("checkpoint", "given as", "network", "input", "weights (sha256)", "leak check by content hashes")
    return Table("Checkpoints", header, tuple(lines), 6)


def speed_table(summary: Mapping[str, Any]) -> Table:
    """Latency and memory of each checkpoint under each protocol, over all cases."""
    lines = []
    for entry in summary["protocols"]:
        total = entry["groups"][-1]
        for label in summary["checkpoints"]:
            cost = [number(total[name][label], digits) for name, digits in COST]
            lines.append((entry["protocol"]["name"], label, *cost))
    notes = ("Prediction of all objects of a case together, image encoder included; reading and scoring excluded.",)
    header = ("protocol", "checkpoint", "frames a second", "seconds a case", "peak memory, MB")
    return Table("Speed and memory", header, tuple(lines), 2, (), notes)


COST = (("frames_per_second", 2), ("seconds", 2), ("peak_mb", 0))


def failure_table(summary: Mapping[str, Any]) -> Table:
    """The cases without scores, and why."""
    lines = tuple((f["dataset"], f["case"], f["stage"], f["reason"], f["remedy"]) for f in summary["failures"])
    notes = (
        "A case that failed under one checkpoint or protocol is left out of all, so that they stay comparable. "
        "File names were printed when it failed; they are not kept here, since they may name a patient.",
    )
    return Table("Failures", ("data set", "case", "stage", "reason", "remedy"), lines, 5, (), notes)


def _any(groups: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(value is not None for group in groups for value in group.get(name, {}).values())


def _interval(group: Mapping[str, Any], label: str) -> str:
    found = (group.get("dsc_interval") or {}).get(label)
    return "-" if found is None else f"[{found[0]:.3f}, {found[1]:.3f}]"


def change_text(change: Mapping[str, Any] | None) -> str:
    """'+0.412 [+0.380, +0.441]', without brackets where there are too few patients for an interval."""
    if change is None or change["mean"] is None:
        return "-"
    text = f"{change['mean']:+.3f}"
    return text if change["low"] is None else f"{text} [{change['low']:+.3f}, {change['high']:+.3f}]"


def number(value: float | None, digits: int = 3) -> str:
    """The number, or a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


# -------------------------------------------------------------------------------------------------------- writing


def to_rich(table: Table) -> RichTable:
    """For the terminal; a line above each block of totals."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    made, wide = RichTable(title=escape(table.title), title_justify="left"), len(table.header) > WIDE
    for place, name in enumerate(table.header):
        words = place < table.texts
        made.add_column(escape(name), justify="left" if words else "right", no_wrap=not words and not wide)
    for place, cells in enumerate(table.lines):
        last = place == len(table.lines) - 1
        ends = last or table.is_total(place + 1) != table.is_total(place)
        style = "bold" if table.is_total(place) else None
        made.add_row(*(escape(cell) for cell in cells), style=style, end_section=ends)
    return made


def to_markdown(table: Table) -> str:
    """A pipe table under a heading, with its notes."""
    sides = [":--" if place < table.texts else "--:" for place in range(len(table.header))]
    rows = [_pipes(table.header), _pipes(sides)]
    for place, cells in enumerate(table.lines):
        rows.append(_pipes([f"**{_plain(cell)}**" for cell in cells] if table.is_total(place) else cells))
    return "\n".join([f"## {_plain(table.title)}", "", *rows, *(f"\n{_plain(note)}" for note in table.notes)]) + "\n"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell if cell.startswith("**") else _plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """One line, without what Markdown takes for markup."""
    return re.sub(r"([|*_<>`\\])", r"\\\1", " ".join(text.split()))


def to_latex(table: Table, label: str) -> str:
    """A booktabs table; LABEL is what \\ref{tab:LABEL} finds."""
    columns = "".join("l" if place < table.texts else "r" for place in range(len(table.header)))
    rows = [" & ".join(escape_latex(name) for name in table.header) + r" \\", r"\midrule"]
    for place, cells in enumerate(table.lines):
        if place and table.is_total(place) and not table.is_total(place - 1):
            rows.append(r"\midrule")
        bold = table.is_total(place)
        rows.append(
            " & ".join(f"\\textbf{{{escape_latex(cell)}}}" if bold else escape_latex(cell) for cell in cells) + r" \\"
        )
    caption = ". ".join([table.title.rstrip("."), *(note.rstrip(".") for note in table.notes)]) + "."
    small = [r"\scriptsize"] if len(table.header) > WIDE else []
    name = re.sub(r"[^a-zA-Z0-9-]", "-", label)
    head = [r"\begin{table}", r"\centering", *small, f"\\caption{{{escape_latex(caption)}}}", f"\\label{{tab:{name}}}"]
    body = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([*head, *body, ""])


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it stands; what begins with a bracket is guarded, since `\\\\ [` reads it as a length."""
    escaped = re.sub(r"(?<![\w.])-(?=\d)", "$-$", "".join(LATEX.get(letter, letter) for letter in text))
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped
