"""What raw data and shards hold, and what is wrong with them, as plain values for the command to print."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from dataclasses import dataclass
from statistics import median

from medsam2.cases.case import CaseError
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.layouts.registry import CaseRef
from medsam2.cases.values import present_values
from medsam2.shards.index import JSON, SegmentIndex


@dataclass(frozen=True)
class CaseSurvey:
    """One raw case as text for a table; `error` says why it cannot be read."""

    ref: CaseRef
    shape: str = ""
    spacing: str = ""
    labels: str = ""
    notes: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class StructureEntry:
    """One structure of one split of a data set. `frames`: on which it is seen; `median_pixels`: on these."""

    dataset: str
    split: str
    modality: str
    structure: str
    patients: int
    cases: int
    objects: int
    frames: int
    median_pixels: float


def survey_case(ref: CaseRef) -> CaseSurvey:
    """Read a case and describe it; a case that cannot be read is described by its error."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CaseWarning)
            case = ref.load()
    except CaseError as error:
        return CaseSurvey(ref, error=str(error))
    names = {(label.plane, label.id): label.name for label in case.labels}
    present = [names[p, v] for p, plane in enumerate(case.planes) for v in present_values(plane) if (p, v) in names]
    unit = "s" if case.kind == "clip" else "mm"
    spacing = " x ".join(f"{s:.3g}" for s in case.spacing)
    kind = " RGB" if case.image.ndim == 4 else ""
    return CaseSurvey(
        ref,
        shape=" x ".join(map(str, case.image.shape[:3])) + f"{kind} {case.image.dtype}",
        spacing=f"{spacing} ({unit}, mm, mm)" if unit == "s" else f"{spacing} mm",
        labels=", ".join(dict.fromkeys(present)) or "none",
        notes=tuple(str(w.message) for w in caught if issubclass(w.category, CaseWarning)),
    )


def structure_table(index: SegmentIndex) -> list[StructureEntry]:
    """One entry a (dataset, split, modality, structure), sorted."""
    columns = ["dataset", "split", "modality", "patient", "case", "objects"]
    found: dict[tuple[str, str, str, str], list[tuple[str, str, list[int]]]] = defaultdict(list)
    for batch in index.table.select(columns).to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            for entry in row["objects"]:
                key = (row["dataset"], row["split"], row["modality"], entry["name"])
                found[key].append((row["patient"], row["case"], [n for n in entry["pixels"] if n]))
    return [
        StructureEntry(
            *key,
            patients=len({patient for patient, _, _ in objects}),
            cases=len({case for _, case, _ in objects}),
            objects=len(objects),
            frames=sum(len(pixels) for _, _, pixels in objects),
            median_pixels=float(median(n for _, _, pixels in objects for n in pixels)),
        )
        for key, objects in sorted(found.items())
    ]


def check_shards(index: SegmentIndex) -> list[str]:
    """What is wrong with a folder of shards: missing files, sizes other than stated, patients in two splits."""
    problems = []
    path = index.folder / JSON
    try:
        stated = json.loads(path.read_text())["shards"]
    except (OSError, ValueError, KeyError) as error:
        problems.append(f"{path}: not readable ({error}); sizes cannot be checked.")
        stated = {}
    named = set(index.table.column("shard").to_pylist())
    for shard in sorted(named | set(stated)):
        file = index.folder / shard
        if not file.is_file():
            problems.append(f"{file}: missing.")
        elif shard in stated and file.stat().st_size != stated[shard]["bytes"]:
            problems.append(f"{file}: {file.stat().st_size} bytes, expected {stated[shard]['bytes']}.")
    splits: dict[tuple[str, str], set[str]] = defaultdict(set)
    hashes: dict[str, set[str]] = defaultdict(set)
    table = index.table
    names = ("dataset", "patient", "split", "content_hash")
    for dataset, patient, split, content in zip(*(table.column(n).to_pylist() for n in names), strict=True):
        splits[dataset, patient].add(split)
        hashes[content].add(split)
    for (dataset, patient), where in sorted(splits.items()):
        if len(where) > 1:
            problems.append(f"{dataset}: patient {patient} stands in {' and '.join(sorted(where))}.")
    leaks = sum(len(where) > 1 for where in hashes.values())
    if leaks:
        problems.append(f"{leaks} images stand in more than one split (equal content hash).")
    return problems
