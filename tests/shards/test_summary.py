from __future__ import annotations

from typing import Any

from medsam2.shards.summary import duplicates, summarise


def row(case: str, patient: str, content: str, split: str = "train", window: str = "w", dataset: str = "d") -> dict:
    organ = {"name": "organ", "value": 1, "plane": 0, "pixels": [0, 4], "boxes": [0] * 8}
    return {
        "dataset": dataset, "split": split, "case": case, "patient": patient, "content_hash": content,
        "modality": "CT", "window": window, "frames": [0, 1], "objects": [organ], "shard": f"{dataset}-{split}-0.tar",
    }  # fmt: skip


def summary(rows: list[dict], **more: Any) -> dict[str, Any]:
    return summarise(rows, {r["shard"]: {"bytes": 10, "sha256": ""} for r in rows}, {"seed": 0}, 2, **more)


def test_equal_voxels_are_listed_whatever_the_split_and_apart_where_they_stand_in_two():
    rows = [
        row("c1", "p1", "h"), row("c2", "p2", "h"), row("c3", "p3", "g"), row("c4", "p4", "g", "val", dataset="e"),
        row("c5", "p5", "k"), row("c5", "p5", "k"), row("c6", "p6", ""), row("c7", "p7", ""),
    ]  # fmt: skip
    content = summary(rows)
    assert content["duplicates"] == [["c1", "c2"], ["c3", "c4"]]
    assert content["duplicates_across_splits"] == [["c3", "c4"]]
    assert content["counts"]["segments"] == 8 and content["failed_cases"] == 2


def test_one_scan_under_two_windows_is_no_duplicate_and_two_equal_scans_of_a_patient_are():
    windows = [row("c1", "p1", "h", window="abdomen"), row("c2", "p1", "h", window="lung")]
    assert duplicates(windows) == []
    assert duplicates([*windows, row("c3", "p1", "h", window="lung")]) == [["c1", "c2", "c3"]]


def test_source_and_licence_are_stated_for_every_data_set_and_empty_where_nobody_said():
    provenance = {"d": {"source": "https://example.org", "licence": "CC-BY-4.0", "layout": "nnunet"}, "gone": {}}
    content = summary([row("c1", "p1", "h"), row("c2", "p2", "g", dataset="e")], provenance=provenance)["datasets"]
    nothing = {"source": "", "licence": "", "layout": ""}
    assert content == {"d": provenance["d"], "e": nothing, "gone": nothing}
