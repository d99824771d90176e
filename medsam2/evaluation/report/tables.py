"""The tables of an evaluation, made from `summary.json`: what stands in them, not how they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from medsam2.evaluation.statistics.comparison import p_text
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
Part = Mapping[str, Any]
ColumnOf = tuple[Column, Callable[[Part, str], Cell]]
"""A column of a table with a row for each part and checkpoint, and what it shows of them."""


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
    groups, labels = shown_groups(entry["groups"]), summary["checkpoints"]
    columns = [*_fields("dataset", "modality", "structure"), _checkpoint(entry, summary["leaks"])]
    columns += [_count("cases", 1), _count("patients", 1), _score("dsc"), _change(labels)]
    for place, name in enumerate(("nsd", "absent_empty")):
        if any(value is not None for group in groups for value in group[name].values()):
            columns.append(_score(name, drop=2 + place))
    return _by_checkpoint(f"{_name(entry)}: scores", groups, labels, columns, _change_notes(labels))


def metric_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table:
    """Every score that was computed, of each group and checkpoint."""
    groups = shown_groups(entry["groups"])
    names = [*SCORES, "dsc_case", "iou_case", "dsc_pooled", "iou_pooled"]
    names = [name for name in names if any(v is not None for g in groups for v in g.get(name, {}).values())]
    columns = [*_fields("dataset", "modality", "structure"), _checkpoint(), *map(_score, names)]
    note = "HD95 and ASSD in mm for volumes, in pixels for clips and stills. Scores are means over patients."
    return _by_checkpoint(f"{_name(entry)}: all scores", groups, summary["checkpoints"], columns, (note,))


def size_table(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> Table:
    """DSC by size of the object, where there are enough objects for classes."""
    labels = summary["checkpoints"]
    sizes = [{**group, **size} for group in shown_groups(entry["groups"]) for size in group["sizes"]]
    columns = [*_fields("dataset", "modality", "structure", "size"), _checkpoint(), _count("objects", 1)]
    columns += [_score("dsc"), _change(labels)]
    notes = ("Sizes are terciles of the true volume within data set, modality and structure.", *_change_notes(labels))
    return _by_checkpoint(f"{_name(entry)}: small and large objects", sizes, labels, columns, notes)


def comparison_table(entry: Mapping[str, Any]) -> Table:
    """The paired tests between checkpoints (`comparison`); parts with too few patients for one are counted."""
    tests = [test for test in entry["comparisons"] if test["p"] is not None or test["by"] == TOTAL]
    rows: list[tuple[Cell, ...]] = []
    for test in tests:
        part = " ".join(test[name] for name in ("modality", "structure", "size") if test[name] != TOTAL)
        part = f"{part} objects" if test["by"] == "size" else part or TOTAL
        pair, score = f"{test['from']} → {test['to']}", NAMES.get(test["score"], test["score"])
        change = _signed(test["mean"], test["low"], test["high"], 2 if test["score"] in DISTANCES else 3)
        tested = test["better"], p_text(test["p"]), p_text(test["p_holm"]), test["verdict"]
        rows.append((part, score, pair, test["patients"], change, *tested))
    columns = [*words("part", "score", "checkpoints"), *numbers("patients", drop=1), *numbers("change\n[95 %]")]
    columns += [
        *numbers("share\nbetter", digits=2, drop=2),
        *numbers("p", drop=1),
        *numbers("p\nHolm"),
        *words("verdict"),
    ]
    notes = [
        "Sign-flip permutation test over patients, two-sided; Holm's correction within each kind of part and score. "
        "Share better: of the patients who gain."
    ]
    if untested := len(entry["comparisons"]) - len(tests):
        notes.append(f"{untested} smaller parts have too few patients for a test; see summary.json.")
    totals = frozenset(place for place, test in enumerate(tests) if test["by"] == TOTAL)
    return Table(f"{_name(entry)}: differences", tuple(columns), tuple(rows), totals, tuple(notes))


def robustness_table(entry: Mapping[str, Any]) -> Table:
    """What corruptions cost: a row a corruption (or total) and checkpoint."""

    def drop(part: Part, label: str) -> str:
        found = part["drop"][label]
        return f"{found['mean']:.3f}" + ("" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]")

    def relative_drop(part: Part, label: str) -> float | None:
        share = part["relative_drop"][label]
        return None if share is None else 100 * share

    parts = entry["robustness"]
    columns: list[ColumnOf] = [
        (Column("corruption"), lambda part, _: corruption_title(part)),
        _checkpoint(), _count("patients", 2), _score("clean"), _score("mean", "damaged"),
        (Column("drop\n[95 %]", True), drop), (Column("drop\n%", True, 1, 1), relative_drop), _score("error", "CE", 0),
    ]  # fmt: skip
    note = (
        "DSC of the undamaged and the damaged images (mean over the severities), means over patients; drop = clean - "
        "damaged. CE: corruption error, the sum of 1 - DSC over the severities in per cent of the first checkpoint's."
    )
    return _by_checkpoint(f"{_name(entry)}: robustness", parts, list(parts[0]["clean"]), columns, (note,))


def corruption_title(part: Mapping[str, Any]) -> str:
    """How a table or a picture calls an entry of `robustness`."""
    if part["corruption"] != TOTAL:
        return str(part["corruption"]).replace("_", " ")
    suite = part["suite"]
    return "all corruptions" if suite == TOTAL else f"all of {SUITE_TITLES.get(suite, suite)}"


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
    parts = [{**entry["groups"][-1], "protocol": _name(entry), "structure": ""} for entry in summary["protocols"]]
    columns = [*_fields("protocol"), _checkpoint(), _score("frames_per_second", "frames a second", 2)]
    columns += [_score("seconds", "seconds a case", 2), _score("peak_mb", "peak memory, MB", 0)]
    note = "Prediction of all objects of a case together, image encoder included; reading and scoring excluded."
    return _by_checkpoint("Speed and memory", parts, summary["checkpoints"], columns, (note,))


def failure_table(summary: Mapping[str, Any]) -> Table:
    """The cases without scores, and why."""
    rows = tuple((f["dataset"], f["case"], f["stage"], f["reason"], f["remedy"]) for f in summary["failures"])
    note = (
        "A case that failed under one checkpoint or protocol is left out of all, so that they stay comparable. "
        "File names were printed when it failed; they are not kept here, since they may name a patient."
    )
    return Table("Failures", words("data set", "case", "stage", "reason", "remedy"), rows, notes=(note,))


def shown_groups(groups: Sequence[Part]) -> list[Part]:
    """Without the totals that repeat another row: those of a modality with one group, and of a single modality."""
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
    title: str, parts: Sequence[Part], labels: Sequence[str], columns: Sequence[ColumnOf], notes: tuple[str, ...]
) -> Table:
    """A row a part and checkpoint; parts whose structure or corruption is "all" are totals."""
    pairs = [(part, label) for part in parts for label in labels]
    rows = tuple(tuple(value(part, label) for _, value in columns) for part, label in pairs)
    totals = {n for n, (part, _) in enumerate(pairs) if part.get("structure", part.get("corruption")) == TOTAL}
    return Table(title, tuple(column for column, _ in columns), rows, frozenset(totals), notes)


def _fields(*names: str) -> list[ColumnOf]:
    return [(Column("data set" if name == "dataset" else name), _value(name)) for name in names]


def _count(name: str, drop: int) -> ColumnOf:
    return Column(name, True, drop=drop), _value(name)


def _value(name: str) -> Callable[[Part, str], Cell]:
    return lambda part, _: part[name]


def _score(name: str, heading: str = "", digits: int = 3, drop: int = 0) -> ColumnOf:
    column = Column(heading or NAMES.get(name, name), True, 2 if name in DISTANCES else digits, drop)
    return column, lambda part, label: part[name][label]


def _checkpoint(entry: Mapping[str, Any] | None = None, leaks: Mapping[str, int] | None = None) -> ColumnOf:
    """The label, with a mark where the protocol is outside of the checkpoint's training, and where cases leak."""
    outside, leaking = (entry or {}).get("outside", {}), leaks or {}
    return Column(
        "checkpoint"
    ), lambda _, label: label + (OUTSIDE if label in outside else "") + (LEAK if leaking.get(label) else "")


def _change(labels: Sequence[str]) -> ColumnOf:
    """With several checkpoints the change that the last one makes; of a single one the interval of its mean."""

    def change(part: Part, label: str) -> str | None:
        found = part["dsc_change"]
        if label != labels[-1] or found is None or found["mean"] is None:
            return None
        return _signed(found["mean"], found["low"], found["high"], 3)

    def interval(part: Part, label: str) -> str | None:
        found = (part.get("dsc_interval") or {}).get(label)
        return None if found is None else f"[{found[0]:.3f}, {found[1]:.3f}]"

    return (Column("change in DSC\n[95 %]", True), change) if len(labels) > 1 else (Column("[95 %]", True), interval)


def _change_notes(labels: Sequence[str]) -> tuple[str, ...]:
    return (f"Change in DSC: from {labels[0]} to {labels[-1]}, on the same objects.",) if len(labels) > 1 else ()


def _signed(mean: float, low: float | None, high: float | None, digits: int) -> str:
    """'+0.412 [+0.380, +0.441]', without brackets where there are too few patients for an interval."""
    text = f"{mean:+.{digits}f}"
    return text if low is None else f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["protocol"]["name"])
