"""The tables of an evaluation, made from `summary.json`: what stands in them, not how they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medsam2.evaluation.comparison import p_text
from medsam2.evaluation.summary import DISTANCES, SCORES, TOTAL
from medsam2.reporting.tables import MISSING, Cell, Column, Table, numbers, words

if TYPE_CHECKING:
    import pandas as pd

OUTSIDE, LEAK = "†", "‡"
NAMES = {
    "dsc": "DSC", "iou": "IoU", "nsd": "NSD", "hd95": "HD95", "assd": "ASSD", "volume_error": "volume error", "j": "J",
    "f": "F", "jf": "J&F", "cldice": "clDice", "instance_f1": "instance F1", "present_dsc": "DSC present",
    "present_iou": "IoU present", "prompt_dsc": "DSC prompted", "other_dsc": "DSC elsewhere", "absent_empty": "empty",
    "volume_error_abs": "|volume error|", "noc85": "NoC@85", "noc90": "NoC@90",
    "dsc_case": "DSC by case", "iou_case": "IoU by case", "dsc_pooled": "DSC pooled", "iou_pooled": "IoU pooled",
}  # fmt: skip
SUITE_TITLES = {"imagenet_c": "ImageNet-C", "surgical": "surgery", "medical": "scanners"}
CHANGE = Column("change in DSC\n[95 %]", numeric=True)
INTERVAL = Column("[95 %]", numeric=True, drop=1)


def all_tables(summary: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Every table with a short name, in order: those of each protocol, then those of the run."""
    several = len(summary["protocols"]) > 1
    for entry in summary["protocols"]:
        for name, table in protocol_tables(summary, entry):
            yield f"{name}-{entry['protocol']['name']}" if several else name, table
    yield "checkpoints", checkpoint_table(summary)
    yield "speed", speed_table(summary)
    if summary["failures"]:
        yield "failures", failure_table(summary)


def protocol_tables(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """The tables of one of `summary["protocols"]` that have something to show."""
    yield "scores", score_table(summary, entry)
    yield "all", metric_table(summary, entry)
    if any(group["sizes"] for group in entry["groups"]):
        yield "sizes", size_table(summary, entry)
    if entry["comparisons"]:
        yield "differences", comparison_table(entry)
    if entry["robustness"]:
        yield "robustness", robustness_table(entry)


def score_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table:
    """DSC and NSD of each group and checkpoint, the change in DSC, and how well absence is seen."""
    labels, leaks = summary["checkpoints"], summary["leaks"]
    groups = shown_groups(entry["groups"])
    extras = [
        name for name in ("nsd", "absent_empty") if any(group[name][label] for group in groups for label in labels)
    ]
    rows: list[tuple[Cell, ...]] = []
    for group, label in _by_checkpoint(groups, labels):
        row = [*_part(group), marked(label, entry, leaks), group["cases"], group["patients"], group["dsc"][label]]
        row += [_change(group, label, labels), *(group[name][label] for name in extras)]
        rows.append((*row, *([group["leaks"]] if any(leaks.values()) else [])))
    columns = (*words("data set", "modality", "structure", "checkpoint"), *numbers("cases", "patients", drop=1))
    columns += (*numbers("DSC"), CHANGE if len(labels) > 1 else INTERVAL)
    columns += tuple(Column(NAMES[name], numeric=True, drop=2 + place) for place, name in enumerate(extras))
    columns += numbers("leak", drop=1) if any(leaks.values()) else ()
    return _table(f"{entry['protocol']['name']}: scores", columns, rows, _change_notes(labels))


def metric_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table:
    """Every score that was computed, of each group and checkpoint."""
    groups, labels = shown_groups(entry["groups"]), summary["checkpoints"]
    names = [*SCORES, "dsc_case", "iou_case", "dsc_pooled", "iou_pooled"]
    names = [name for name in names if any(v is not None for g in groups for v in g.get(name, {}).values())]
    rows = [
        (*_part(group), label, *(group[name][label] for name in names))
        for group, label in _by_checkpoint(groups, labels)
    ]
    columns = words("data set", "modality", "structure", "checkpoint")
    columns += tuple(Column(NAMES[name], True, 2 if name in DISTANCES else 3) for name in names)
    notes = ("HD95 and ASSD in mm for volumes, in pixels for clips and stills. Scores are means over patients.",)
    return _table(f"{entry['protocol']['name']}: all scores", columns, rows, notes)


def size_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table:
    """DSC by size of the object, where there are enough objects for classes."""
    labels = summary["checkpoints"]
    rows = [
        (*_part(group), size["size"], label, size["objects"], size["dsc"][label], _change(size, label, labels))
        for group in shown_groups(entry["groups"])
        for size, label in _by_checkpoint(group["sizes"], labels)
    ]
    columns = (*words("data set", "modality", "structure", "size", "checkpoint"), *numbers("objects", drop=2))
    columns += (*numbers("DSC"), CHANGE if len(labels) > 1 else INTERVAL)
    notes = ("Sizes are terciles of the true volume within data set, modality and structure.", *_change_notes(labels))
    return _table(f"{entry['protocol']['name']}: small and large objects", columns, rows, notes)


def comparison_table(entry: Mapping[str, Any]) -> Table:
    """The paired tests between checkpoints (`comparison`); parts with too few patients for one are counted."""
    tests = [test for test in entry["comparisons"] if test["p"] is not None or test["by"] == TOTAL]
    rows: list[tuple[Cell, ...]] = []
    for test in tests:
        change = _signed(test["mean"], test["low"], test["high"], 2 if test["score"] in DISTANCES else 3)
        parts = [test[name] for name in ("modality", "structure", "size") if test[name] != TOTAL]
        part = " ".join(parts) + (" objects" if test["by"] == "size" else "") or TOTAL
        pair = f"{test['from']} → {test['to']}"
        p, holm = p_text(test["p"]), p_text(test["p_holm"])
        rows.append(
            (
                part,
                NAMES.get(test["score"], test["score"]),
                pair,
                test["patients"],
                change,
                test["better"],
                p,
                holm,
                test["verdict"],
            )
        )
    columns = (
        *words("part", "score", "checkpoints"),
        *numbers("patients", drop=1),
        Column("change\n[95 %]", numeric=True),
    )
    columns += (
        Column("share\nbetter", True, 2, 2),
        Column("p", True, drop=1),
        Column("p\nHolm", True),
        *words("verdict"),
    )
    notes = [
        "Sign-flip permutation test over patients, two-sided; Holm's correction within each kind of part and score. "
        "Share better: of the patients who gain."
    ]
    if untested := len(entry["comparisons"]) - len(tests):
        notes.append(f"{untested} smaller parts have too few patients for a test; see summary.json.")
    totals = frozenset(place for place, test in enumerate(tests) if test["by"] == TOTAL)
    return Table(f"{entry['protocol']['name']}: differences", columns, tuple(rows), totals, tuple(notes))


def robustness_table(entry: Mapping[str, Any]) -> Table:
    """What corruptions cost: a row a corruption (or total) and checkpoint."""
    found = entry["robustness"]
    labels = list(found[0]["clean"])
    rows: list[tuple[Cell, ...]] = []
    for part, label in _by_checkpoint(found, labels):
        drop, relative = part["drop"][label], part["relative_drop"][label]["mean"]
        span = "" if drop["low"] is None else f" [{drop['low']:.3f}, {drop['high']:.3f}]"
        row = [corruption_title(part), label, part["patients"], part["clean"][label], part["mean"][label]]
        rows.append(
            (*row, f"{drop['mean']:.3f}{span}", None if relative is None else 100 * relative, part["error"][label])
        )
    columns = (*words("corruption", "checkpoint"), *numbers("patients", drop=2), *numbers("clean", "damaged"))
    columns += (Column("drop\n[95 %]", True), Column("drop\n%", True, 1, 1), Column("CE", True, 0))
    totals = frozenset(place for place in range(len(rows)) if found[place // len(labels)]["corruption"] == TOTAL)
    note = (
        "DSC of the undamaged and the damaged images (mean over the severities), means over patients; drop = clean - "
        "damaged. CE: corruption error, the sum of 1 - DSC over the severities in per cent of the first checkpoint's."
    )
    return Table(f"{entry['protocol']['name']}: robustness", columns, tuple(rows), totals, (note,))


def corruption_title(part: Mapping[str, Any]) -> str:
    """How a table or a picture calls an entry of `robustness`."""
    if part["corruption"] != TOTAL:
        return str(part["corruption"]).replace("_", " ")
    suite = part["suite"]
    return "all corruptions" if suite == TOTAL else f"all of {SUITE_TITLES.get(suite, suite)}"


def worst_table(rows: pd.DataFrame, label: str, count: int) -> Table:
    """The objects of one protocol on which a checkpoint does worst, lowest first."""
    names = ["modality", "structure", "dataset", "case", "dsc", "nsd", "prompt_frames", "prompt_dsc", "other_dsc"]
    lowest = rows[rows["checkpoint"] == label].sort_values("dsc", kind="stable").head(count)[names]
    columns = (*words("modality", "structure", "data set", "case"), *numbers("DSC", "NSD"), *words("prompted frames"))
    columns += numbers("DSC prompted", "DSC elsewhere")
    cells = tuple(lowest.astype({"prompt_frames": str}).itertuples(index=False, name=None))
    return Table(f"Lowest DSC of {label}", columns, cells)


def checkpoint_table(summary: Mapping[str, Any]) -> Table:
    """What is known of each checkpoint, and whether it was trained on these cases."""
    rows = []
    for model in summary["models"]:
        leaks = summary["leaks"][model["label"]]
        leak = f"{leaks} cases were trained on" if leaks else "none of these cases was trained on"
        leak = leak if model["records_cases"] else "unknown: the file does not say what it was trained on"
        size = f"{model['image_size']} px"
        rows.append((model["label"], model["name"], model["model"], size, model["weights"], leak))
    columns = words("checkpoint", "given as", "network", "input", "weights (sha256)", "leak check by content hashes")
    return Table("Checkpoints", columns, tuple(rows))


def speed_table(summary: Mapping[str, Any]) -> Table:
    """Latency and memory of each checkpoint under each protocol, over all cases."""
    names = ("frames_per_second", "seconds", "peak_mb")
    rows = tuple(
        (entry["protocol"]["name"], label, *(entry["groups"][-1][name][label] for name in names))
        for entry, label in _by_checkpoint(summary["protocols"], summary["checkpoints"])
    )
    note = "Prediction of all objects of a case together, image encoder included; reading and scoring excluded."
    columns = (*words("protocol", "checkpoint"), *numbers("frames a second", "seconds a case", digits=2))
    return Table("Speed and memory", (*columns, Column("peak memory, MB", True, 0)), rows, notes=(note,))


def failure_table(summary: Mapping[str, Any]) -> Table:
    """The cases without scores, and why."""
    rows = tuple((f["dataset"], f["case"], f["stage"], f["reason"], f["remedy"]) for f in summary["failures"])
    note = (
        "A case that failed under one checkpoint or protocol is left out of all, so that they stay comparable. "
        "File names were printed when it failed; they are not kept here, since they may name a patient."
    )
    return Table("Failures", words("data set", "case", "stage", "reason", "remedy"), rows, notes=(note,))


# ---------------------------------------------------------------------------------------------------------- cells


def marked(label: str, entry: Mapping[str, Any], leaks: Mapping[str, int]) -> str:
    """The label of a checkpoint, with a mark where the protocol is outside its training and where cases leak."""
    return label + (OUTSIDE if label in entry["outside"] else "") + (LEAK if leaks.get(label) else "")


def shown_groups(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without the totals that repeat another row: those of a modality with one group, and of a single modality."""
    members = Counter(group["modality"] for group in groups if group["dataset"] != TOTAL)
    return [
        group
        for group in groups
        if group["dataset"] != TOTAL
        or members[group["modality"]] > 1
        or (group["modality"] == TOTAL and (len(members) > 1 or group["structure"] != TOTAL))
    ]


def _table(title: str, columns: tuple[Column, ...], rows: Sequence[tuple[Cell, ...]], notes: tuple[str, ...]) -> Table:
    """A table whose third column is the structure, which is "all" in totals."""
    return Table(title, columns, tuple(rows), frozenset(n for n, row in enumerate(rows) if row[2] == TOTAL), notes)


def _by_checkpoint(
    parts: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> Iterator[tuple[Mapping[str, Any], str]]:
    return ((part, label) for part in parts for label in labels)


def _part(group: Mapping[str, Any]) -> list[Cell]:
    return [group["dataset"], group["modality"], group["structure"]]


def _change(group: Mapping[str, Any], label: str, labels: Sequence[str]) -> str:
    """With several checkpoints the change that the last one makes; of a single one the interval of its mean."""
    if len(labels) == 1:
        interval = (group.get("dsc_interval") or {}).get(label)
        return MISSING if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"
    change = group["dsc_change"]
    if label != labels[-1] or change is None or change["mean"] is None:
        return MISSING
    return _signed(change["mean"], change["low"], change["high"], 3)


def _signed(mean: float, low: float | None, high: float | None, digits: int) -> str:
    """'+0.412 [+0.380, +0.441]', without brackets where there are too few patients for an interval."""
    text = f"{mean:+.{digits}f}"
    return text if low is None else f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _change_notes(labels: Sequence[str]) -> tuple[str, ...]:
    return (f"Change in DSC: from {labels[0]} to {labels[-1]}, on the same objects.",) if len(labels) > 1 else ()
