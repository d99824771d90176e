"""What raw data and shards hold, and what is wrong with them, as plain values for the command and its page."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsam2.cases.case import CaseError, CaseRef
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.layouts import load_case
from medsam2.cases.values import present_values
from medsam2.shards.checks import Finding, run_checks
from medsam2.shards.index import JSON, SegmentIndex
from medsam2.shards.load import load_record
from medsam2.shards.pictures import spread
from medsam2.shards.tables import CASE, STRUCTURE, ShardTables, Track, case_views, no_track, read_tables

HISTOGRAMS = 2000  # json members that are read: a few seconds, and enough for a mean of any data set
SAME_VOXELS = "equal voxels"
SHOWN = 6  # cases that a line names


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
class GroupEntry:
    """Counts of one split of one modality of a data set; `bytes` in the shards."""

    modality: str
    dataset: str
    split: str
    patients: int
    cases: int
    segments: int
    frames: int
    objects: int
    bytes: int


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


@dataclass(frozen=True, eq=False)
class ShardsReport:
    """Everything that inspection finds in a folder of shards.

    Attributes:
        summary: index.json, empty where it cannot be read.
        problems: what makes the shards unfit for use. findings: what to look at, worst kind first.
        histograms: by segment row, of at most `HISTOGRAMS` segments; `histogram_note` says of how many, or why of none.
    """

    index: SegmentIndex
    summary: dict[str, Any]
    tables: ShardTables
    groups: list[GroupEntry]
    structures: list[StructureEntry]
    problems: list[str]
    findings: list[Finding]
    histograms: Mapping[int, np.ndarray]
    histogram_note: str


def survey_case(ref: CaseRef) -> CaseSurvey:
    """Read a case and describe it; a case that cannot be read is described by its error."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CaseWarning)
            case = load_case(ref)
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


def inspect_shards(index: SegmentIndex, track: Track = no_track) -> ShardsReport:
    """Count, check and sample a folder of shards.

    Raises:
        UserError: the index is not readable or lists no segment.
    """
    tables = read_tables(index, track)
    summary = read_summary(index)
    histograms, note = read_histograms(index, tables, track)
    return ShardsReport(
        index,
        summary,
        tables,
        group_table(tables),
        structure_table(tables),
        [*check_files(index, tables, summary), *check_splits(tables)],
        [*run_checks(case_views(tables, histograms)), *repeated_cases(tables)],
        histograms,
        note,
    )


def read_summary(index: SegmentIndex) -> dict[str, Any]:
    """index.json, or an empty dict where it cannot be read."""
    try:
        found = json.loads((index.folder / JSON).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def group_table(tables: ShardTables) -> list[GroupEntry]:
    """One entry a (modality, dataset, split), sorted."""
    groups = tables.segments.groupby(["modality", "dataset", "split"])
    table = groups[["patient", "case"]].nunique()
    table["segments"] = groups.size()
    table = table.join(groups[["frames", "objects", "bytes"]].sum())
    return [GroupEntry(*values) for values in zip(*_columns(table.reset_index()), strict=True)]


def structure_table(tables: ShardTables) -> list[StructureEntry]:
    """One entry a (dataset, split, modality, structure), sorted. `objects`: those of the segments."""
    groups = tables.objects.groupby(STRUCTURE)
    table = groups[["patient", "case"]].nunique()
    table["objects"] = groups.size()
    table["frames"] = groups["frames"].sum()
    table = table.reset_index()
    entries = []
    for dataset, split, modality, name, patients, cases, objects, frames in zip(*_columns(table), strict=True):
        areas = tables.areas.get((dataset, split, modality, name))
        median = float(np.median(areas)) if areas is not None and areas.size else 0.0
        entries.append(StructureEntry(dataset, split, modality, name, patients, cases, objects, frames, median))
    return entries


def check_files(index: SegmentIndex, tables: ShardTables, summary: Mapping[str, Any]) -> list[str]:
    """Shards that are missing or of another size than index.json states."""
    problems = []
    stated = summary.get("shards")
    if not isinstance(stated, dict):
        problems.append(f"{index.folder / JSON}: missing or not readable; sizes of shards cannot be checked.")
        stated = {}
    for shard in sorted(set(tables.segments["shard"].unique()) | set(stated)):
        file = index.folder / shard
        if not file.is_file():
            problems.append(f"{file}: missing; copy it again, or prepare again.")
        elif shard in stated and file.stat().st_size != stated[shard]["bytes"]:
            size, expected = file.stat().st_size, stated[shard]["bytes"]
            problems.append(f"{file}: {size} bytes, expected {expected}; copy it again, or prepare again.")
    return problems


def check_splits(tables: ShardTables) -> list[str]:
    """Leaks: patients in two splits, and equal voxels in two splits."""
    problems = []
    pairs = tables.cases[["dataset", "patient", "split"]].drop_duplicates()
    pairs = pairs[pairs.duplicated(["dataset", "patient"], keep=False)]  # of 200,000 patients, those few
    for (dataset, patient), splits in pairs.groupby(["dataset", "patient"])["split"]:
        where = " and in ".join(sorted(splits))
        problems.append(f"leak: {dataset}: patient {patient} is in {where}; prepare again with a --split-file.")
    for members in equal_voxels(tables):
        if len({split for _, split, _ in members}) > 1:
            problems.append(
                f"leak: equal voxels in two splits: {name_cases(members)}; name only one of them in a --split-file, "
                "or put all in one split."
            )
    return problems


def repeated_cases(tables: ShardTables) -> list[Finding]:
    """Cases of one split with equal voxels, which count more than once."""
    findings = []
    for members in equal_voxels(tables):
        if len({split for _, split, _ in members}) == 1:
            (dataset, split, case), *others = members
            what = f"the same image as {name_cases(others)}"
            findings.append(Finding(SAME_VOXELS, dataset, split, case, what, "keep one, or merge their labels"))
    return findings


def equal_voxels(tables: ShardTables) -> list[list[tuple[str, str, str]]]:
    """Groups of (dataset, split, case) whose images are equal, each of two or more.

    A scan that was prepared under several windows is one patient's, each time with another window: no such group.
    """
    cases = tables.cases[tables.cases["content_hash"] != ""]
    same = cases[cases["content_hash"].duplicated(keep=False)]
    groups = same.groupby("content_hash", sort=False)
    several = groups[["dataset", "split", "patient", "window"]].nunique()
    one = (several[["dataset", "split", "patient"]] == 1).all(axis=1) & (several["window"] == groups.size())
    unlike = same[~same["content_hash"].map(one).astype(bool)]
    grouped = unlike.groupby("content_hash", sort=False)
    return [list(members[CASE].itertuples(index=False, name=None)) for _, members in grouped]


def name_cases(members: list[tuple[str, str, str]]) -> str:
    """'a data set train case 12ab, ... and 3 more'."""
    text = ", ".join(f"{dataset} {split} case {case}" for dataset, split, case in members[:SHOWN])
    return text + (f" and {len(members) - SHOWN} more" if len(members) > SHOWN else "")


def read_histograms(
    index: SegmentIndex, tables: ShardTables, track: Track = no_track
) -> tuple[dict[int, np.ndarray], str]:
    """Histograms by segment row, of segments spread evenly over data sets and splits; and of how many of them."""
    segments = tables.segments
    rows = spread(list(zip(segments["dataset"], segments["split"], strict=True)), HISTOGRAMS)
    found, unread = {}, 0
    for row in track(rows, "reading histograms"):
        try:
            histogram = load_record(index, row).histogram
        except ValueError:  # a damaged shard, which is a problem of its own, or a member that is no record
            unread += 1
            continue
        if sum(histogram):
            found[row] = np.asarray(histogram)
    if not found and not unread and not index.table["json_length"].to_numpy().any():
        return {}, "No intensity histograms in tars of other tools; windows are not checked."
    if not found:
        return {}, "No intensity histograms in these shards; prepare them again to have windows checked."
    of = f"{len(found):,} of {len(segments):,} segments" if len(found) < len(segments) else "all segments"
    note = f"Histograms and warnings about windows: from {of}"
    return found, note + (f"; {unread:,} could not be read." if unread else ".")


def _columns(table: Any) -> list[list[Any]]:
    """The columns of a data frame as lists of Python values."""
    return [table[name].tolist() for name in table.columns]
