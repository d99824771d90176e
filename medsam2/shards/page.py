"""One self-contained HTML page about raw data or shards: tables, figures, warnings and pictures with outlines.

Names of cases and patients stay off the page (FAULTS 25b): raw cases are numbered, shards have salted ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsam2.cases.case import CaseError, CaseRef
from medsam2.cases.intensity import to_uint8
from medsam2.cases.layouts import load_case
from medsam2.errors import UserError
from medsam2.shards.checks import by_kind
from medsam2.shards.figures import charts
from medsam2.shards.inspect import SAME_VOXELS, CaseSurvey, ShardsReport, equal_voxels
from medsam2.shards.page_template import TEMPLATE
from medsam2.shards.pictures import Picture, labelled_picture, segment_picture, spread
from medsam2.shards.tables import Track, no_track

PICTURES = 24
LISTED = 5000  # warnings of a kind: more make a page that browsers open slowly
RULES = 3  # windows that a line names


@dataclass(frozen=True, eq=False)
class Table:
    """A table of a page; numbers are set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


def shards_page(report: ShardsReport, track: Track = no_track) -> str:
    """The page of a folder of shards."""
    pictures, unread = shard_pictures(report, track)
    segments = len(report.tables.segments)
    shown = f"{len(pictures)} of {segments:,} segments, spread over data sets, modalities and splits: of each, the "
    shown += "frame that shows most of its objects." + (f" {unread} more could not be read." if unread else "")
    findings = by_kind(report.findings)
    return _render(
        title="Shards",
        lead=_lead(report),
        # a page is passed on: the path of the folder is nobody else's business
        problems=[problem.replace(f"{report.index.folder}/", "") for problem in report.problems],
        overview=_overview(report),
        structures=Table(
            ("data set", "split", "modality", "structure", "patients", "cases", "objects", "frames", "median pixels"),
            [(e.dataset, e.split, e.modality, e.structure, e.patients, e.cases, e.objects, e.frames,
              round(e.median_pixels)) for e in report.structures],
        ),
        datasets=dataset_table(report),
        provenance=provenance(report),
        preparation=preparation(report.summary),
        charts=charts(report.tables, report.histograms, report.histogram_note),
        histogram_note="" if report.histograms else report.histogram_note,
        pictures=pictures,
        pictures_note=shown,
        duplicates=duplicate_table(report),
        moved=moved_table(report.summary),
        findings={kind: (len(found), found[:LISTED]) for kind, found in findings.items() if kind != SAME_VOXELS},
        warnings=len(report.findings),
        shards=True,
    )  # fmt: skip


def cases_page(refs: Sequence[CaseRef], surveys: Sequence[CaseSurvey], track: Track = no_track) -> str:
    """The page of raw data: one line a case, numbered in the order of the terminal's table."""
    columns = ("data set", "case", "layout", "modality", "shape", "spacing", "labels", "notes")
    rows = []
    for number, survey in enumerate(surveys, start=1):
        shown = ("cannot be read", "", "") if survey.error else (survey.shape, survey.spacing, survey.labels)
        ref = survey.ref
        # what notes and errors say may hold names of files, so that they are only counted here
        rows.append((ref.dataset, number, ref.layout, ref.modality or "?", *shown, len(survey.notes) or ""))
    good = [n for n, survey in enumerate(surveys) if not survey.error]
    chosen = [good[i] for i in spread([(refs[n].dataset, refs[n].modality) for n in good], PICTURES)]
    pictures = [p for n in track(chosen, "drawing") if (p := case_picture(refs[n], n + 1))]
    failed = len(surveys) - len(good)
    return _render(
        title="Raw data",
        lead=f"{len(surveys)} cases, {failed} of them cannot be read. Cases are numbered in the order of the table on "
        "the terminal; what is wrong with a case stands there.",
        problems=(),
        cases=Table(columns, rows),
        pictures=pictures,
        pictures_note=f"{len(pictures)} of {len(good)} cases: of each, the slice with the largest labelled area.",
    )


def shard_pictures(report: ShardsReport, track: Track = no_track) -> tuple[list[Picture], int]:
    """Up to 24 segments with objects, spread over (data set, modality, split), and how many could not be read."""
    segments = report.tables.segments
    labelled = segments[segments["objects"] > 0] if (segments["objects"] > 0).any() else segments
    groups = list(zip(labelled["dataset"], labelled["modality"], labelled["split"], strict=True))
    pictures, unread = [], 0
    for place in track(spread(groups, PICTURES), "drawing"):
        try:
            pictures.append(segment_picture(report.index, int(labelled.index[place])))
        except UserError:
            unread += 1  # a damaged shard is among the problems already
    return pictures, unread


def case_picture(ref: CaseRef, number: int) -> Picture | None:
    """The slice of a raw case with the largest labelled area, or None where it cannot be shown."""
    try:
        case = load_case(ref)
        image, window = to_uint8(case)
    except CaseError:
        return None  # it cannot be scaled; the table says what it is
    frame = int(np.argmax([np.count_nonzero(case.planes[:, t]) for t in range(case.planes.shape[1])]))
    text = f"{case.dataset} case {number}, {case.modality}, slice {frame}, {window}"
    names = {(label.plane, label.id): label.name for label in case.labels}
    return labelled_picture(image[frame], case.planes[:, frame], names, text)


def dataset_table(report: ShardsReport) -> Table:
    """One line a (data set, modality): its cases as they came, and what became of their frames."""
    columns = ("data set", "modality", "cases", "frame size", "frames", "window", "stored as")
    rows = []
    for (dataset, modality), cases in report.tables.cases.groupby(["dataset", "modality"]):
        stored = ", ".join(sorted(cases["codec"].unique()))
        reduced = (cases["height"] < cases["original_h"]) | (cases["width"] < cases["original_w"])
        if reduced.any():
            stored += f"; {reduced.sum():,} cases reduced to {cases[['height', 'width']].max().max()} px"
        size = _sizes(cases["original_h"], cases["original_w"])
        windows = _windows(cases["window"].unique().tolist())
        rows.append((dataset, modality, len(cases), size, _range(cases["original_t"]), windows, stored))
    return Table(columns, rows)


def provenance(report: ShardsReport) -> Table:
    """One line a data set: where it is from, as index.json says."""
    described = report.summary.get("datasets")
    described = described if isinstance(described, dict) else {}
    rows = []
    for dataset in sorted(report.tables.cases["dataset"].unique()):
        said = described.get(dataset) or {}
        rows.append((dataset, *(said.get(name) or "not stated" for name in ("layout", "source", "licence"))))
    return Table(("data set", "layout", "source", "licence"), rows)


def preparation(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(setting, value) of what `medsam2 prepare` was told, and what it left out."""
    configuration = summary.get("configuration")
    rows = list(configuration.items()) if isinstance(configuration, dict) else []
    names = {
        "failed_cases": "cases that failed",
        "removed_patients": "patients removed",
        "moved_patients": "patients moved",
    }
    for key, name in names.items():
        value = summary.get(key)
        if value:
            rows.append((name, len(value) if isinstance(value, list | dict) else value))
    return [(name, text) for key, value in rows for name, text in _settings(str(key).replace("_", " "), value)]


def duplicate_table(report: ShardsReport) -> Table:
    """One line a case whose image another case has too."""
    rows = []
    for number, members in enumerate(equal_voxels(report.tables)[:LISTED], start=1):
        leak = len({split for _, split, _ in members}) > 1
        rows += [(number, *member, "in two splits" if leak else "in one split") for member in members]
    return Table(("group", "data set", "split", "case", ""), rows)


def moved_table(summary: dict[str, Any]) -> Table | None:
    """Patients whom `medsam2 prepare` put into another split because of equal images."""
    moves = [move for move in summary.get("moved_patients") or () if isinstance(move, dict)]
    columns = ("data set", "patient", "split", "because of case")
    rows = [
        (m.get("dataset", ""), m.get("patient", ""), f"{m.get('before')} to {m.get('after')}", m.get("like", ""))
        for m in moves[:LISTED]
    ]
    return Table(columns, rows) if rows else None


def _lead(report: ShardsReport) -> str:
    cases, segments = report.tables.cases, report.tables.segments
    patients = len(cases[["dataset", "patient"]].drop_duplicates())
    size = sum(entry.bytes for entry in report.groups)
    return (
        f"{patients:,} patients, {len(cases):,} cases, {len(segments):,} segments, {segments['frames'].sum():,} "
        f"frames and {len(report.tables.objects):,} objects in {segments['shard'].nunique():,} shards, "
        f"{size / 1e6:,.1f} MB. "
        "Cases and patients have salted ids; their names are not in the shards."
    )


def _overview(report: ShardsReport) -> Table:
    columns = ("modality", "data set", "split", "patients", "cases", "segments", "frames", "objects", "MB")
    rows = [
        (e.modality, e.dataset, e.split, e.patients, e.cases, e.segments, e.frames, e.objects, round(e.bytes / 1e6, 1))
        for e in report.groups
    ]
    return Table(columns, rows)


def _range(values: Any) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _sizes(height: Any, width: Any) -> str:
    """'512 x 512', or 'from 480 x 640 to 512 x 512' by area."""
    area = (height * width).to_numpy()
    (small_h, small_w), (large_h, large_w) = (
        (int(height.iloc[place]), int(width.iloc[place])) for place in (area.argmin(), area.argmax())
    )
    small, large = f"{small_h} x {small_w}", f"{large_h} x {large_w}"
    return small if small == large else f"{small} to {large}"


def _windows(windows: list[str]) -> str:
    """The windows of a data set; those that a rule gave for each case by the rule alone."""
    rules = [w.partition("(")[2].rstrip(")") if "(" in w else w for w in windows]
    names = sorted(set(rules) if len(windows) > 1 else set(windows))
    return "; ".join(names[:RULES]) + (f"; {len(names) - RULES} more" if len(names) > RULES else "")


def _settings(name: str, value: object) -> list[tuple[str, str]]:
    """Lines for a setting; one of settings inside settings for each of these, nothing for an empty one."""
    if isinstance(value, dict):
        if any(isinstance(entry, dict) for entry in value.values()):
            return [line for key, entry in value.items() for line in _settings(f"{name}, {key}", entry)]
        value = [f"{key} {entry}" for key, entry in value.items()]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [] if value is None or value == "" else [(name, str(value))]


def _render(**content: Any) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(**content)
