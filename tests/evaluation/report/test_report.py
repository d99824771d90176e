"""The tables of an evaluation: what stands in them, and what is marked."""

from __future__ import annotations

from typing import Any

from medsam2.evaluation.report.tables import (
    comparison_table,
    score_table,
    size_table,
    speed_table,
    without_redundant_totals,
)
from medsam2.reporting.tables import Table


def _lines(table: Table) -> list[dict[str, str]]:
    names = [column.name for column in table.columns]
    return [dict(zip(names, line, strict=True)) for line in table.lines]


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


def test_each_checkpoint_has_a_line_and_the_last_one_the_change() -> None:
    summary = _summary({})
    table = score_table(summary, summary["protocols"][0])
    before, after = _lines(table)
    assert (before["checkpoint"], before["DSC"], before["NSD"]) == ("before", "0.500", "-")
    assert (after["checkpoint"], after["DSC"], after["NSD"]) == ("after", "0.750", "0.250")
    assert before["change in DSC\n[95 %]"] == "-" and after["change in DSC\n[95 %]"] == "+0.250 [+0.200, +0.300]"
    assert table.notes == ("Change in DSC: from before to after, on the same objects.",)


def test_totals_that_repeat_a_row_are_left_out_and_the_others_are_bold() -> None:
    totals = [_group("CT", "all", "all"), _group("US", "all", "all"), _group("all", "all", "all")]
    groups = [_group("CT", "liver"), _group("CT", "kidney"), _group("US", "nerve"), *totals]
    assert without_redundant_totals(groups) == [*groups[:4], groups[5]]
    entry = {"protocol": {"name": "box"}, "outside": {}, "groups": groups}
    summary = {"checkpoints": ["before"], "leaks": {"before": 0}}
    assert score_table(summary, entry).totals == {3, 4}


def test_leaks_and_prompts_outside_of_training_are_marked_at_the_checkpoint() -> None:
    summary = _summary({"before": "box uses boxes"}, leaks=1)
    lines = _lines(score_table(summary, summary["protocols"][0]))
    assert [line["checkpoint"] for line in lines] == ["before†", "after‡"]


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
    assert table.lines[0] == [
        "small objects", "HD95", "a → b", "9", "-1.50 [-2.00, -1.00]", "0.88", "0.004", "0.012", "better",
    ]  # fmt: skip
    assert table.lines[1][0] == "all" and table.lines[1][4:8] == ["-1.50", "0.88", "-", "-"]


def test_small_and_large_objects_have_a_line_for_each_checkpoint() -> None:
    summary = _summary({})
    entry = summary["protocols"][0]
    for group in entry["groups"]:
        group["sizes"] = []
    change = {"mean": 0.1, "low": 0.05, "high": 0.2}
    entry["groups"][0]["sizes"] = [
        {"size": "small", "objects": 3, "dsc": {"before": 0.2, "after": 0.3}, "dsc_change": change}
    ]
    table = size_table(summary, entry)
    assert not table.totals and table.lines[0][2:] == ["liver", "small", "before", "3", "0.200", "-"]
    assert table.lines[1][2:] == ["liver", "small", "after", "3", "0.300", "+0.100 [+0.050, +0.200]"]


def test_speed_is_that_of_all_cases() -> None:
    assert speed_table(_summary({})).lines == [
        ["box", "before", "0.50", "0.50", "100"], ["box", "after", "0.75", "0.75", "-"],
    ]  # fmt: skip
