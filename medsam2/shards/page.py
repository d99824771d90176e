"""The page of `medsam2 inspect --html` about raw data or shards: tables, diagrams, warnings and pictures with outlines.

Names of cases and patients stay off the page: raw cases are numbered, shards have salted ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml

from medsam2.cases.case import CaseError
from medsam2.cases.intensity import to_uint8
from medsam2.cases.layouts.registry import CaseRef
from medsam2.errors import UserError
from medsam2.reporting.page import Block, Code, Folded, Gallery, Note, Page, Picture, Section
from medsam2.reporting.tables import Table, numbers, words
from medsam2.shards.checks import by_kind
from medsam2.shards.figures import charts, labelled_picture, segment_picture
from medsam2.shards.inspect import CaseSurvey, ShardsReport
from medsam2.shards.tables import Track, no_track, spread

MAX_PICTURES = 24
MAX_FINDINGS = 5000  # of a kind: more make a page that browsers open slowly
MAX_OPEN_ROWS = 24  # longer tables are folded
MAX_WINDOWS = 3  # that a line names
DIAGRAM_WIDTH = 340  # CSS pixels


def shards_page(report: ShardsReport, track: Track = no_track) -> Page:
    """The page of a folder of shards."""
    # a page is passed on: the path of the folder is nobody else's business
    problems = [Note(problem.replace(f"{report.index.folder}/", ""), "warning") for problem in report.problems]
    structures = report.structures
    count = len(structures.rows)
    about = "Objects of the segments, the frames that show them, and their median area on these, in stored pixels."
    diagrams = charts(report.tables, report.histograms, report.histogram_note)
    note = () if report.histograms else (Note(report.histogram_note),)
    settings = preparation(report.summary)
    sections = (
        Section("Problems", tuple(problems)),
        Section("Overview", (report.overview,)),
        Section(f"Warnings ({len(report.findings):,})", _warnings(report)),
        Section("Structures", (Note(about), Folded(f"{count} rows", (structures,), open=count <= MAX_OPEN_ROWS))),
        Section("Datasets", (dataset_table(report),)),
        Section("Preparation", (Code(settings),) if settings else ()),
        Section("Distributions", (*note, Gallery(tuple(diagrams), DIAGRAM_WIDTH))),
        Section("Pictures", _shard_pictures(report, track)),
    )
    return Page("Shards", _lead(report), sections)


def cases_page(refs: Sequence[CaseRef], surveys: Sequence[CaseSurvey], track: Track = no_track) -> Page:
    """The page of raw data: one line a case, numbered in the order of the terminal's table."""
    rows: list[tuple[str | int, ...]] = []
    for number, survey in enumerate(surveys, start=1):
        cells = ("cannot be read", "", "") if survey.error else (survey.shape, survey.spacing, survey.labels)
        # what notes and errors say may hold names of files, so that they are only counted here
        rows.append((survey.ref.dataset, number, survey.ref.layout, survey.ref.modality or "?", *cells,
                     len(survey.notes)))  # fmt: skip
    columns = words("layout", "modality", "shape", "spacing", "labels")
    table = Table("", (*words("dataset"), *numbers("case"), *columns, *numbers("notes")), tuple(rows))
    good = [n for n, survey in enumerate(surveys) if not survey.error]
    chosen = [good[i] for i in spread([(refs[n].dataset, refs[n].modality) for n in good], MAX_PICTURES)]
    pictures = [p for n in track(chosen, "drawing") if (p := _case_picture(refs[n], n + 1))]
    about = f"{len(pictures)} of {len(good)} cases: of each, the slice with the largest labelled area."
    lead = (
        f"{len(surveys)} cases, {len(surveys) - len(good)} of them cannot be read. Cases are numbered in the order of "
        "the table on the terminal; what is wrong with a case stands there."
    )
    sections = (Section("Cases", (table,)), Section("Pictures", (Note(about), Gallery(tuple(pictures)))))
    return Page("Raw data", lead, sections)


def _warnings(report: ShardsReport) -> tuple[Block, ...]:
    """One table a kind, worst kind first."""
    blocks: list[Block] = []
    for kind, findings in by_kind(report.findings).items():
        rows = tuple((f.dataset, f.split, f.case, f.what, f.remedy) for f in findings[:MAX_FINDINGS])
        notes = (f"The first {MAX_FINDINGS:,} of {len(findings):,}.",) if len(findings) > MAX_FINDINGS else ()
        table = Table(kind, words("dataset", "split", "case", "what", "what to do"), rows, notes=notes)
        blocks.append(Folded(f"{kind}: {len(findings):,}", (table,), open=len(findings) <= MAX_OPEN_ROWS))
    return tuple(blocks) or (Note("None."),)


def _shard_pictures(report: ShardsReport, track: Track) -> tuple[Block, ...]:
    """Up to 24 segments with objects, spread over (dataset, modality, split)."""
    segments = report.tables.segments
    labelled = segments[segments["objects"] > 0] if (segments["objects"] > 0).any() else segments
    groups = list(zip(labelled["dataset"], labelled["modality"], labelled["split"], strict=True))
    pictures, unread = [], 0
    for place in track(spread(groups, MAX_PICTURES), "drawing"):
        try:
            pictures.append(segment_picture(report.index, int(labelled.index[place])))
        except UserError:
            unread += 1  # a damaged shard is among the problems already
    about = (
        f"{len(pictures)} of {len(segments):,} segments, spread over datasets, modalities and splits: of each, the "
        "frame that shows most of its objects." + (f" {unread} more could not be read." if unread else "")
    )
    return Note(about), Gallery(tuple(pictures))


def _case_picture(ref: CaseRef, number: int) -> Picture | None:
    """The slice of a raw case with the largest labelled area, or None where it cannot be shown."""
    try:
        case = ref.load()
        image, window = to_uint8(case)
    except CaseError:
        return None  # it cannot be scaled; the table says what it is
    frame = int(np.argmax([np.count_nonzero(case.planes[:, t]) for t in range(case.planes.shape[1])]))
    text = f"{case.dataset} case {number}, {case.modality}, slice {frame}, {window}"
    names = {(label.plane, label.id): label.name for label in case.labels}
    return labelled_picture(image[frame], case.planes[:, frame], names, text)


def dataset_table(report: ShardsReport) -> Table:
    """One line a (dataset, modality): the window of its intensities, and how frames are stored."""
    rows: list[tuple[str | int, ...]] = []
    for (dataset, modality), cases in report.tables.cases.groupby(["dataset", "modality"]):
        stored = ", ".join(sorted(cases["codec"].unique()))
        reduced = (cases["height"] < cases["original_h"]) | (cases["width"] < cases["original_w"])
        if reduced.any():
            stored += f"; {reduced.sum():,} cases reduced to {cases[['height', 'width']].max().max()} px"
        rows.append((dataset, modality, len(cases), _windows(cases["window"].unique().tolist()), stored))
    columns = (*words("dataset", "modality"), *numbers("cases"), *words("window", "stored as"))
    return Table("What became of their intensities and frames", columns, tuple(rows))


def preparation(summary: dict[str, Any]) -> str:
    """What index.json says of the origin of the datasets and of what `medsam2 prepare` was told, as yaml."""
    stated = {name: summary.get(name) for name in ("configuration", "datasets", "failed_cases")}
    settings = {name: value for name, value in stated.items() if value not in (None, "", [], {}, 0)}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip() if settings else ""


def _lead(report: ShardsReport) -> str:
    cases, segments = report.tables.cases, report.tables.segments
    patients = len(cases[["dataset", "patient"]].drop_duplicates())
    return (
        f"{patients:,} patients, {len(cases):,} cases, {len(segments):,} segments, {segments['frames'].sum():,} "
        f"frames and {len(report.tables.objects):,} objects in {segments['shard'].nunique():,} shards. "
        "Cases and patients have salted ids; their names are not in the shards."
    )


def _windows(windows: list[str]) -> str:
    """The windows of a dataset; those that a rule gave for each case by the rule alone."""
    rules = [w.partition("(")[2].rstrip(")") if "(" in w else w for w in windows]
    names = sorted(set(rules) if len(windows) > 1 else set(windows))
    more = f"; {len(names) - MAX_WINDOWS} more" if len(names) > MAX_WINDOWS else ""
    return "; ".join(names[:MAX_WINDOWS]) + more
