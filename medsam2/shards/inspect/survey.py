"""Survey and check raw data and shards, for the command `inspect` and its page."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2.cases.case import CaseError, CaseRef
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.layouts import load_case
from medsam2.cases.values import present_values
from medsam2.reporting.tables import Column, Table, numbers, words
from medsam2.shards.index import SUMMARY_FILE, SegmentIndex, check_shards, read_summary
from medsam2.shards.inspect.checks import Finding, run_checks
from medsam2.shards.inspect.tables import CASE_COLUMNS, ShardTables, Track, case_views, no_track, read_tables, spread
from medsam2.shards.load import load_record
from medsam2.shards.summary import duplicates

if TYPE_CHECKING:
    import pandas as pd

MAX_HISTOGRAMS = 2000  # each reads a json member: a few seconds, and enough for the mean of any dataset
SAME_VOXELS = "equal voxels"
MAX_CASES_NAMED = 6  # per line


@dataclass(frozen=True)
class CaseSurvey:
    """One raw case as text for a table; `error` says why it cannot be read."""

    ref: CaseRef
    shape: str = ""
    spacing: str = ""
    labels: str = ""
    notes: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, eq=False)
class ShardsReport:
    """The result of inspecting a folder of shards.

    Attributes:
        summary: index.json, empty if it cannot be read.
        overview, structures: counts by modality, dataset and split, and by structure.
        problems: reasons not to use the shards. findings: warnings, worst kind first.
        histograms: by segment row, of at most `MAX_HISTOGRAMS` segments.
        histogram_note: the number of segments that they cover, or why there are none.
    """

    index: SegmentIndex
    summary: dict[str, Any]
    tables: ShardTables
    overview: Table
    structures: Table
    problems: list[str]
    findings: list[Finding]
    histograms: Mapping[int, np.ndarray]
    histogram_note: str


def survey_case(ref: CaseRef) -> CaseSurvey:
    """Read a case and describe it, or its error if it cannot be read."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CaseWarning)
            case = load_case(ref)
    except CaseError as error:
        return CaseSurvey(ref, error=str(error))
    names = {(label.plane, label.id): label.name for label in case.labels}
    present = [names[p, v] for p, plane in enumerate(case.planes) for v in present_values(plane) if (p, v) in names]
    t, y, x = (f"{s:.3g}" for s in case.spacing)
    spacing = f"{t} s x {y} x {x} mm" if case.kind == "clip" else f"{t} x {y} x {x} mm"
    if case.kind != "volume" and tuple(case.spacing[1:]) == (1, 1):
        # Readers give pixels of exactly 1 mm if a clip or a still does not state their size.
        spacing = f"{case.spacing[0]:.3g} s, pixels unknown" if case.kind == "clip" else "unknown"
    kind = " RGB" if case.image.ndim == 4 else ""
    return CaseSurvey(
        ref,
        shape=" x ".join(map(str, case.image.shape[:3])) + f"{kind} {case.image.dtype}",
        spacing=spacing,
        labels=", ".join(dict.fromkeys(present)) or "none",
        notes=tuple(str(w.message) for w in caught if issubclass(w.category, CaseWarning)),
    )


def inspect_shards(index: SegmentIndex, track: Track = no_track) -> ShardsReport:
    """Survey and check a folder of shards.

    Raises:
        UserError: the index is not readable or lists no segment.
    """
    tables = read_tables(index, track)
    summary = read_summary(index.folder)
    histograms, note = read_histograms(index, tables, track)
    return ShardsReport(
        index,
        summary,
        tables,
        overview_table(index, tables),
        structure_table(tables),
        [*check_files(index, tables, summary), *check_splits(tables)],
        [*run_checks(case_views(tables, histograms)), *repeated_cases(tables)],
        histograms,
        note,
    )


def overview_table(index: SegmentIndex, tables: ShardTables) -> Table:
    """One row per (modality, dataset, split), sorted; its size is that of the shards that hold it."""

    def megabytes(shards: pd.Series) -> float:
        files = [index.folder / shard for shard in shards.unique()]
        return sum(file.stat().st_size for file in files if file.is_file()) / 1e6

    groups = tables.segments.groupby(["modality", "dataset", "split"])
    counts = groups[["patient", "case"]].nunique()
    counts["segments"] = groups.size()
    counts = counts.join(groups[["frames", "objects"]].sum())
    counts["megabytes"] = groups["shard"].agg(megabytes)
    columns = (*numbers("patients", "cases"), *numbers("segments", drop=2), *numbers("frames", "objects", drop=1))
    columns = (*words("modality", "dataset", "split"), *columns, Column("MB", numeric=True, digits=1, drop=3))
    return Table("Cases, segments and objects", columns, tuple(counts.reset_index().itertuples(False, None)))


def structure_table(tables: ShardTables) -> Table:
    """One row per (dataset, split, modality, structure), sorted. Objects are counted per segment.

    The median is over objects, of the median number of pixels over the frames that show an object.
    """
    groups = tables.objects.groupby(["dataset", "split", "modality", "name"])
    counts = groups[["patient", "case"]].nunique()
    counts["objects"] = groups.size()
    counts["frames"] = groups["frames"].sum()
    counts["pixels"] = groups["median"].median().round().astype(int)
    columns = (*words("dataset", "split"), *words("modality", drop=3), *words("structure"))
    columns = (*columns, *numbers("patients", "cases"), *numbers("objects", drop=1), *numbers("frames", drop=2))
    columns = (*columns, *numbers("median pixels", drop=1))
    return Table("Structures", columns, tuple(counts.reset_index().itertuples(False, None)))


def check_files(index: SegmentIndex, tables: ShardTables, summary: Mapping[str, Any]) -> list[str]:
    """List shards that are missing or differ in size from index.json."""
    shards = tables.segments["shard"].unique()
    if not isinstance(summary.get("shards"), dict):
        problem = f"{index.folder / SUMMARY_FILE}: missing or not readable; sizes of shards cannot be checked."
        return [problem, *check_shards(index.folder, shards, {})]
    return [*check_shards(index.folder, {*shards, *summary["shards"]}, summary["shards"])]


def check_splits(tables: ShardTables) -> list[str]:
    """List leaks: patients in two splits, and equal voxels in two splits."""
    problems = []
    pairs = tables.cases[["dataset", "patient", "split"]].drop_duplicates()
    # Filtering first is fast: few of 200,000 patients are in two splits.
    pairs = pairs[pairs.duplicated(["dataset", "patient"], keep=False)]
    for (dataset, patient), splits in pairs.groupby(["dataset", "patient"])["split"]:
        names = " and in ".join(sorted(splits))
        problems.append(f"leak: {dataset}: patient {patient} is in {names}; prepare again with a --split-file.")
    for members in equal_voxels(tables):
        if len({split for _, split, _ in members}) > 1:
            problems.append(
                f"leak: equal voxels in two splits: {name_cases(members)}; name only one of them in a --split-file, "
                "or put all in one split."
            )
    return problems


def repeated_cases(tables: ShardTables) -> list[Finding]:
    """List cases of one split with equal voxels, which count more than once."""
    findings = []
    for members in equal_voxels(tables):
        if len({split for _, split, _ in members}) == 1:
            (dataset, split, case), *others = members
            what = f"the same image as {name_cases(others)}"
            findings.append(Finding(SAME_VOXELS, dataset, split, case, what, "keep one, or merge their labels"))
    return findings


def equal_voxels(tables: ShardTables) -> list[list[tuple[str, str, str]]]:
    """Groups of two or more (dataset, split, case) whose images are equal.

    A scan of one patient that was prepared under several windows is not such a group.
    """
    repeated = tables.cases[tables.cases["content_hash"].duplicated(keep=False)]
    names = {members[2]: members for members in repeated[CASE_COLUMNS].itertuples(False, None)}
    return [[names[case] for case in group] for group in duplicates(repeated.to_dict("records"))]


def name_cases(members: list[tuple[str, str, str]]) -> str:
    """Name cases: 'liver train case 12ab, ... and 3 more'."""
    text = ", ".join(f"{dataset} {split} case {case}" for dataset, split, case in members[:MAX_CASES_NAMED])
    return text + (f" and {len(members) - MAX_CASES_NAMED} more" if len(members) > MAX_CASES_NAMED else "")


def read_histograms(
    index: SegmentIndex, tables: ShardTables, track: Track = no_track
) -> tuple[dict[int, np.ndarray], str]:
    """Read histograms by segment row, spread evenly over datasets and splits; also returns a note on their number."""
    segments = tables.segments
    rows = spread(list(zip(segments["dataset"], segments["split"], strict=True)), MAX_HISTOGRAMS)
    histograms, unread = {}, 0
    for row in track(rows, "reading histograms"):
        try:
            histogram = load_record(index, row).histogram
        except ValueError:  # a damaged shard, which `check_files` reports, or a member that is not a record
            unread += 1
            continue
        if sum(histogram):
            histograms[row] = np.asarray(histogram)
    if not histograms:
        return {}, "No intensity histograms in these shards: windows are not checked."
    of = f"{len(histograms):,} of {len(segments):,} segments" if len(histograms) < len(segments) else "all segments"
    note = f"Histograms and warnings about windows: from {of}"
    return histograms, note + (f"; {unread:,} could not be read." if unread else ".")
