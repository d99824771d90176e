"""What `index.json` says: counts, shards, statistics and the content hash of every case; no name of a patient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

FORMAT = 1


def summarise(
    rows: Sequence[dict[str, Any]], shards: dict[str, dict[str, Any]], configuration: dict[str, Any], failures: int
) -> dict[str, Any]:
    """The content of `index.json` for index rows (dicts with the columns of `IndexRow`)."""
    cases: dict[str, dict[str, str]] = {}
    for row in rows:
        cases[row["case"]] = {name: row[name] for name in ("dataset", "split", "patient", "modality", "content_hash")}
    return {
        "format": FORMAT,
        "configuration": configuration,
        "counts": counts(rows),
        "groups": groups(rows, shards),
        "structures": structures(rows),
        "failed_cases": failures,
        "shards": shards,
        "cases": cases,
        "duplicates_across_splits": duplicates(cases),
    }


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Patients, cases, segments, objects and frames of some rows."""
    return {
        "patients": len({(row["dataset"], row["patient"]) for row in rows}),
        "cases": len({(row["dataset"], row["case"]) for row in rows}),
        "segments": len(rows),
        "objects": sum(len(row["objects"]) for row in rows),
        "frames": sum(len(row["frames"]) for row in rows),
    }


def groups(rows: Sequence[dict[str, Any]], shards: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a (dataset, modality, split) with its counts and bytes."""
    by_group: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_group[row["dataset"], row["modality"], row["split"]].append(row)
    entries = []
    for (dataset, modality, split), members in sorted(by_group.items()):
        size = sum(shards[name]["bytes"] for name in {row["shard"] for row in members} if name in shards)
        entries.append({"dataset": dataset, "modality": modality, "split": split, **counts(members), "bytes": size})
    return entries


def structures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a (dataset, split, structure): objects, frames with it, median pixels on these frames."""
    pixels: dict[tuple[str, str, str], list[list[int]]] = defaultdict(list)
    for row in rows:
        for found in row["objects"]:
            pixels[row["dataset"], row["split"], found["name"]].append([n for n in found["pixels"] if n])
    return [
        {
            "dataset": dataset,
            "split": split,
            "structure": name,
            "objects": len(objects),
            "frames": sum(map(len, objects)),
            "median_pixels": median(n for o in objects for n in o),
        }
        for (dataset, split, name), objects in sorted(pixels.items())
    ]


def duplicates(cases: dict[str, dict[str, str]]) -> list[list[str]]:
    """Salted ids of cases with the same voxels that stand in different splits."""
    by_hash: dict[str, list[str]] = defaultdict(list)
    for case, entry in cases.items():
        by_hash[entry["content_hash"]].append(case)
    return sorted(sorted(same) for same in by_hash.values() if len({cases[case]["split"] for case in same}) > 1)
