"""The contents of an evaluation's tables, made from `summary.json`; `medsam2.reporting.tables` formats them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from medsam2.evaluation.statistics.comparison import format_p
from medsam2.evaluation.statistics.summary import DISTANCES, SCORES, TOTAL
from medsam2.reporting.tables import Cell, Column, Table, numbers, words

OUTSIDE, LEAK = "†", "‡"
NAMES = {
    "dsc": "DSC", "iou": "IoU", "nsd": "NSD", "hd95": "HD95", "assd": "ASSD", "volume_error": "volume error", "j": "J",
    "f": "F", "jf": "J&F", "cldice": "clDice", "instance_f1": "instance F1", "present_dsc": "DSC present",
    "present_iou": "IoU present", "prompt_dsc": "DSC prompted", "other_dsc": "DSC elsewhere", "absent_empty": "empty",
    "volume_error_abs": "|volume error|", "noc85": "NoC@85", "noc90": "NoC@90",
    "dsc_case": "DSC by case", "iou_case": "IoU by case", "dsc_pooled": "DSC pooled", "iou_pooled": "IoU pooled",
}  # fmt: skip
SUITE_TITLES = {"imagenet_c": "ImageNet-C", "surgical": "surgery", "medical": "scanners"}
Entry = Mapping[str, Any]
"""A group, size class or corruption of summary.json."""
ColumnOf = tuple[Column, Callable[[Entry, str], Cell]]
"""A column, and the function that gives its cell for an entry and a checkpoint."""


def all_tables(summary: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Yield every table with a short name: those of each protocol, then those of the run."""
    several = len(summary["protocols"]) > 1
    for entry in summary["protocols"]:
        for name, table in protocol_tables(summary, entry):
            yield f"{name}-{entry['protocol']['name']}" if several else name, table
    yield "checkpoints", checkpoint_table(summary)
    yield "speed", speed_table(summary)
    if summary["failures"]:
        yield "failures", failure_table(summary)


def protocol_tables(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Yield the non-empty tables of `entry`, one of `summary["protocols"]`."""
    yield "scores", score_table(summary, entry)
    yield "all", metric_table(summary, entry)
    if any(group["sizes"] for group in entry["groups"]):
        yield "sizes", size_table(summary, entry)
    if entry["comparisons"]:
        yield "differences", comparison_table(entry)
    if entry["robustness"]:
        yield "robustness", robustness_table(entry)


def score_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table:
    """DSC and NSD of each group and checkpoint, the change in DSC, and the share of absent frames predicted empty."""
    groups, labels = without_redundant_totals(entry["groups"]), summary["checkpoints"]
    columns = [*_fields("dataset", "modality", "structure"), _checkpoint(entry, summary["leaks"])]
    columns += [_count("cases", 1), _count("patients", 1), _score("dsc"), _change(labels)]
    for place, name in enumerate(("nsd", "absent_empty")):
        if any(value is not None for group in groups for value in group[name].values()):
            columns.append(_score(name, drop=2 + place))
    return _by_checkpoint(f"{_name(entry)}: scores", groups, labels, columns, _change_notes(labels))


def metric_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table:
    """Every computed score of each group and checkpoint."""
    groups = without_redundant_totals(entry["groups"])
    names = [*SCORES, "dsc_case", "iou_case", "dsc_pooled", "iou_pooled"]
    names = [name for name in names if any(v is not None for g in groups for v in g.get(name, {}).values())]
    columns = [*_fields("dataset", "modality", "structure"), _checkpoint(), *map(_score, names)]
    note = "HD95 and ASSD in mm for volumes, in pixels for clips and stills. Scores are means over patients."
    return _by_checkpoint(f"{_name(entry)}: all scores", groups, summary["checkpoints"], columns, (note,))


def size_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table:
    """DSC by size of the object, for groups with enough objects."""
    labels = summary["checkpoints"]
    sizes = [{**group, **size} for group in without_redundant_totals(entry["groups"]) for size in group["sizes"]]
    columns = [*_fields("dataset", "modality", "structure", "size"), _checkpoint(), _count("objects", 1)]
    columns += [_score("dsc"), _change(labels)]
    notes = ("Sizes are terciles of the true volume within dataset, modality and structure.", *_change_notes(labels))
    return _by_checkpoint(f"{_name(entry)}: small and large objects", sizes, labels, columns, notes)


def comparison_table(entry: Mapping[str, Any]) -> Table:
    """The paired tests between checkpoints (`comparison`); a note counts the parts with too few patients for a test."""
    tests = [test for test in entry["comparisons"] if test["p"] is not None or test["by"] == TOTAL]
    rows: list[tuple[Cell, ...]] = []
    for test in tests:
        part = " ".join(test[name] for name in ("modality", "structure", "size") if test[name] != TOTAL)
        part = f"{part} objects" if test["by"] == "size" else part or TOTAL
        pair, score = f"{test['from']} → {test['to']}", NAMES.get(test["score"], test["score"])
        change = _signed(test["mean"], test["low"], test["high"], 2 if test["score"] in DISTANCES else 3)
        outcome = test["better"], format_p(test["p"]), format_p(test["p_holm"]), test["verdict"]
        rows.append((part, score, pair, test["patients"], change, *outcome))
    columns = [*words("part", "score", "checkpoints"), *numbers("patients", drop=1), *numbers("change\n[95 %]")]
    columns += [*numbers("share\nbetter", digits=2, drop=2), *numbers("p", drop=1)]
    columns += [*numbers("p\nHolm"), *words("verdict")]
    notes = [
        "Sign-flip permutation test over patients, two-sided; Holm's correction within each kind of part and score. "
        "Share better: share of patients whose score improves."
    ]
    if untested := len(entry["comparisons"]) - len(tests):
        notes.append(f"{untested} smaller parts have too few patients for a test; see summary.json.")
    totals = frozenset(place for place, test in enumerate(tests) if test["by"] == TOTAL)
    return Table(f"{_name(entry)}: differences", tuple(columns), tuple(rows), totals, tuple(notes))


def robustness_table(entry: Mapping[str, Any]) -> Table:
    """The loss in DSC under corruptions: one row per corruption (or total) and checkpoint."""

    def drop(corruption: Entry, label: str) -> str:
        span = corruption["drop"][label]
        return f"{span['mean']:.3f}" + ("" if span["low"] is None else f" [{span['low']:.3f}, {span['high']:.3f}]")

    def relative_drop(corruption: Entry, label: str) -> float | None:
        share = corruption["relative_drop"][label]
        return None if share is None else 100 * share

    corruptions = entry["robustness"]
    columns: list[ColumnOf] = [
        (Column("corruption"), lambda corruption, _: corruption_title(corruption)),
        _checkpoint(), _count("patients", 2), _score("clean"), _score("mean", "damaged"),
        (Column("drop\n[95 %]", True), drop), (Column("drop\n%", True, 1, 1), relative_drop), _score("error", "CE", 0),
    ]  # fmt: skip
    note = (
        "DSC of clean and damaged images (mean over the severities), means over patients; drop = clean - damaged. "
        "CE: corruption error, the sum of 1 - DSC over the severities in per cent of the first checkpoint's."
    )
    labels = list(corruptions[0]["clean"])
    return _by_checkpoint(f"{_name(entry)}: robustness", corruptions, labels, columns, (note,))


def corruption_title(entry: Entry) -> str:
    """The title of an entry of `robustness` in tables and diagrams."""
    if entry["corruption"] != TOTAL:
        return str(entry["corruption"]).replace("_", " ")
    suite = entry["suite"]
    return "all corruptions" if suite == TOTAL else f"all of {SUITE_TITLES.get(suite, suite)}"


def checkpoint_table(summary: Mapping[str, Any]) -> Table:
    """The network and weights of each checkpoint, and whether it was trained on these cases."""
    rows = []
    for model in summary["models"]:
        leaks = summary["leaks"][model["label"]]
        leak = f"trained on {leaks} of these cases" if leaks else "not trained on any of these cases"
        leak = leak if model["records_cases"] else "unknown: the file does not record its training cases"
        size = f"{model['image_size']} px"
        rows.append((model["label"], model["name"], model["model"], size, model["weights"], leak))
    columns = words("checkpoint", "name", "network", "input", "weights (sha256)", "leak check by content hashes")
    return Table("Checkpoints", columns, tuple(rows))


def speed_table(summary: Mapping[str, Any]) -> Table:
    """Latency and memory of each checkpoint under each protocol, over all cases."""
    totals = [{**entry["groups"][-1], "protocol": _name(entry), "structure": ""} for entry in summary["protocols"]]
    columns = [*_fields("protocol"), _checkpoint(), _score("frames_per_second", "frames per second", 2)]
    columns += [_score("seconds", "seconds per case", 2), _score("peak_mb", "peak memory, MB", 0)]
    note = "Prediction of all objects of a case, including the image encoder, without reading and scoring."
    return _by_checkpoint("Speed and memory", totals, summary["checkpoints"], columns, (note,))


def failure_table(summary: Mapping[str, Any]) -> Table:
    """The cases without scores, and why they failed."""
    rows = tuple((f["dataset"], f["case"], f["stage"], f["reason"], f["remedy"]) for f in summary["failures"])
    note = (
        "A case that failed under one checkpoint or protocol is excluded from all, so that they stay comparable. "
        "File names may contain a patient's name, so they were only printed when the case failed."
    )
    return Table("Failures", words("dataset", "case", "stage", "reason", "remedy"), rows, notes=(note,))


def without_redundant_totals(groups: Sequence[Entry]) -> list[Entry]:
    """Drop totals that repeat another row: of a modality with one group, and over a single modality."""
    members = Counter(group["modality"] for group in groups if group["dataset"] != TOTAL)
    return [
        group
        for group in groups
        if group["dataset"] != TOTAL
        or members[group["modality"]] > 1
        or (group["modality"] == TOTAL and (len(members) > 1 or group["structure"] != TOTAL))
    ]


# -------------------------------------------------------------------------------------------------------- columns


def _by_checkpoint(
    title: str, entries: Sequence[Entry], labels: Sequence[str], columns: Sequence[ColumnOf], notes: tuple[str, ...]
) -> Table:
    """A table with one row per entry and checkpoint; entries whose structure or corruption is "all" are totals."""
    pairs = [(entry, label) for entry in entries for label in labels]
    rows = tuple(tuple(cell(entry, label) for _, cell in columns) for entry, label in pairs)
    totals = {n for n, (entry, _) in enumerate(pairs) if entry.get("structure", entry.get("corruption")) == TOTAL}
    return Table(title, tuple(column for column, _ in columns), rows, frozenset(totals), notes)


def _fields(*names: str) -> list[ColumnOf]:
    return [(Column(name), _value(name)) for name in names]


def _count(name: str, drop: int) -> ColumnOf:
    return Column(name, True, drop=drop), _value(name)


def _value(name: str) -> Callable[[Entry, str], Cell]:
    return lambda entry, _: entry[name]


def _score(name: str, heading: str = "", digits: int = 3, drop: int = 0) -> ColumnOf:
    column = Column(heading or NAMES.get(name, name), True, 2 if name in DISTANCES else digits, drop)
    return column, lambda entry, label: entry[name][label]


def _checkpoint(entry: Mapping[str, Any] | None = None, leaks: Mapping[str, int] | None = None) -> ColumnOf:
    """The label, marked if the checkpoint was not trained with such prompts and if it was trained on these cases."""
    outside, leaking = (entry or {}).get("outside", {}), leaks or {}

    def marked_label(_: Entry, label: str) -> str:
        return label + (OUTSIDE if label in outside else "") + (LEAK if leaking.get(label) else "")

    return Column("checkpoint"), marked_label


def _change(labels: Sequence[str]) -> ColumnOf:
    """With several checkpoints, the change from the first to the last; with one, the interval of its mean."""

    def change(entry: Entry, label: str) -> str | None:
        span = entry["dsc_change"]
        if label != labels[-1] or span is None or span["mean"] is None:
            return None
        return _signed(span["mean"], span["low"], span["high"], 3)

    def interval(entry: Entry, label: str) -> str | None:
        bounds = (entry.get("dsc_interval") or {}).get(label)
        return None if bounds is None else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"

    return (Column("change in DSC\n[95 %]", True), change) if len(labels) > 1 else (Column("[95 %]", True), interval)


def _change_notes(labels: Sequence[str]) -> tuple[str, ...]:
    return (f"Change in DSC: from {labels[0]} to {labels[-1]}, on the same objects.",) if len(labels) > 1 else ()


def _signed(mean: float, low: float | None, high: float | None, digits: int) -> str:
    """Format as '+0.412 [+0.380, +0.441]', without brackets if there are too few patients for an interval."""
    text = f"{mean:+.{digits}f}"
    return text if low is None else f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["protocol"]["name"])
