"""The content of `index.json`: counts, shards, statistics and content hashes of the cases; no patient names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

FORMAT = 1
PROVENANCE = ("source", "licence", "layout")


def summarise(
    rows: Sequence[dict[str, Any]],
    shards: dict[str, dict[str, Any]],
    configuration: dict[str, Any],
    failures: int,
    provenance: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Summarise index rows (dicts with the columns of `IndexRow`) as the content of `index.json`.

    Args:
        failures: number of failed cases. provenance: source, licence and layout by dataset (its name in the rows).
    """
    cases: dict[str, dict[str, str]] = {}
    for row in rows:
        cases[row["case"]] = {name: row[name] for name in ("dataset", "split", "patient", "modality", "content_hash")}
    same = duplicates(rows)
    return {
        "format": FORMAT,
        "configuration": configuration,
        "datasets": datasets(rows, provenance or {}),
        "counts": counts(rows),
        "groups": groups(rows, shards),
        "structures": structures(rows),
        "failed_cases": failures,
        "shards": shards,
        "cases": cases,
        "duplicates": same,
        "duplicates_across_splits": [group for group in same if len({cases[case]["split"] for case in group}) > 1],
    }


def datasets(rows: Sequence[dict[str, Any]], provenance: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Source, licence and layout of every dataset; empty if unknown."""
    names = sorted({row["dataset"] for row in rows} | set(provenance))
    return {name: {key: provenance.get(name, {}).get(key, "") for key in PROVENANCE} for name in names}


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Count patients, cases, segments, objects and frames of index rows."""
    return {
        "patients": len({(row["dataset"], row["patient"]) for row in rows}),
        "cases": len({(row["dataset"], row["case"]) for row in rows}),
        "segments": len(rows),
        "objects": sum(len(row["objects"]) for row in rows),
        "frames": sum(len(row["frames"]) for row in rows),
    }


def groups(rows: Sequence[dict[str, Any]], shards: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per (dataset, modality, split) with its counts and bytes."""
    by_group: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_group[row["dataset"], row["modality"], row["split"]].append(row)
    entries = []
    for (dataset, modality, split), members in sorted(by_group.items()):
        size = sum(shards[name]["bytes"] for name in {row["shard"] for row in members} if name in shards)
        entries.append({"dataset": dataset, "modality": modality, "split": split, **counts(members), "bytes": size})
    return entries


def structures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per (dataset, split, structure): objects, frames that show one, and their median pixels there."""
    pixels: dict[tuple[str, str, str], list[list[int]]] = defaultdict(list)
    for row in rows:
        for table in row["objects"]:
            pixels[row["dataset"], row["split"], table["name"]].append([n for n in table["pixels"] if n])
    return [
        {
            "dataset": dataset,
            "split": split,
            "structure": name,
            "objects": len(objects),
            "frames": sum(map(len, objects)),
            "median_pixels": median([n for o in objects for n in o] or [0]),
        }
        for (dataset, split, name), objects in sorted(pixels.items())
    ]


def duplicates(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Groups of salted ids of cases with the same voxels, in any split.

    A scan under several windows is several cases of one patient, and not a duplicate.
    """
    by_hash: dict[str, dict[str, tuple[str, str, str]]] = defaultdict(dict)
    for row in rows:
        if row["content_hash"]:
            by_hash[row["content_hash"]][row["case"]] = (row["dataset"], row["patient"], row["window"])
    repeated = []
    for same in by_hash.values():
        owners = {(dataset, patient) for dataset, patient, _ in same.values()}
        if len(same) > 1 and (len(owners) > 1 or len(set(same.values())) < len(same)):
            repeated.append(sorted(same))
    return sorted(repeated)
