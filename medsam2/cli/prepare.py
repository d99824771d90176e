"""`medsam2 prepare`: raw data -> shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from medsam2.errors import UserError, did_you_mean, explain_errors

if TYPE_CHECKING:
    from rich.progress import Progress

    from medsam2.cases.case import CaseRef
    from medsam2.cases.settings import SettingsBook
    from medsam2.shards.inspect import CaseSurvey
    from medsam2.shards.plan import Plan
    from medsam2.shards.prepare import Prepared, PrepareOptions

MAX_NOTES = 20
Texts = list[str] | None


@explain_errors
def prepare(
    context: typer.Context,
    source: Annotated[str | None, typer.Argument(help="A folder with one or several data sets, or one file.")] = None,
    out: Annotated[str, typer.Option("--out", help="Folder for the shards, or any fsspec URL, e.g. s3://...")] = "",
    layout: Annotated[str | None, typer.Option(help="Take this layout for all, where it is not recognised.")] = None,
    modality: Annotated[str | None, typer.Option(help="CT, MR, PT, US, ENDOSCOPY, XRAY, ... for all cases.")] = None,
    config: Annotated[Path | None, typer.Option(help="Yaml with what holds for each data set: docs/data.md.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases and their errors; write nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first case that fails.")] = False,
    split: Annotated[str, typer.Option(help="Shares of train,val[,test], by patient.")] = "0.8,0.2",
    split_file: Annotated[
        Path | None, typer.Option(help='Json {"train": [...], "val": [...]} of patient or case names.')
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    exclude_patients: Annotated[
        Path | None, typer.Option(help="Text file of patients who are left out, one name a line.")
    ] = None,
    patient: Annotated[str | None, typer.Option(help="Regular expression with (?P<patient>...) for names.")] = None,
    window: Annotated[
        Texts, typer.Option(help="LO:HI in HU, a preset (abdomen, lung, ...), dicom, percentiles; repeat for several.")
    ] = None,
    axis: Annotated[str | None, typer.Option(help="Slice along auto, x (sagittal), y (coronal) or z (axial).")] = None,
    channels: Annotated[str | None, typer.Option(help="Of several image files a case: each, first or rgb.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Foreground of probability maps and JPEG masks.")] = None,
    instances: Annotated[Texts, typer.Option(help="Structure whose connected parts are objects; repeatable.")] = None,
    min_voxels: Annotated[int | None, typer.Option(help="Of an object in its whole case.")] = None,
    min_pixels: Annotated[int | None, typer.Option(help="Of an object's largest slice; smaller are dropped.")] = None,
    allow_gaps: Annotated[bool, typer.Option("--allow-gaps", help="Read DICOM series with missing slices.")] = False,
    source_name: Annotated[str | None, typer.Option(help="Where the data come from, for cards.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the data, for cards.")] = None,
    codec: Annotated[str, typer.Option(help="zstd, lz4, png or jpeg.")] = "zstd",
    max_side: Annotated[int, typer.Option(help="Larger frames are reduced to this.", min=32)] = 1024,
    segment: Annotated[int, typer.Option(help="Most frames of a training segment.", min=1)] = 64,
    workers: Annotated[
        int, typer.Option(help="Most processes, one case each; 0 means one a core. Less memory: fewer of them.", min=0)
    ] = 0,
    dask: Annotated[
        str | None,
        typer.Option(
            help="Scheduler of a Dask cluster, e.g. tcp://10.0.0.5:8786, whose workers (started with --nthreads 1) "
            "do the work; they must see SOURCE and the staging folder under the same paths."
        ),
    ] = None,
    staging: Annotated[
        Path | None,
        typer.Option(
            help="Folder for prepared cases until they are joined: by default inside of --out, or in ~/.cache for a "
            "URL. With --dask all workers must share it."
        ),
    ] = None,
    remove_patient: Annotated[
        Texts, typer.Option(help="Rewrite the shards at --out without this patient; repeatable, without SOURCE.")
    ] = None,
    index_only: Annotated[
        bool,
        typer.Option(
            "--index-only",
            help="SOURCE is a folder or URL of .tar files that have no index: write it beside them, and change no tar. "
            "See docs/foreign.md.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="With --index-only: replace an index.")] = False,
) -> None:
    """Turn raw scans, clips, stills and masks into shards for training. Stopped or killed, the same command goes on.

    Layouts are recognised and shown: nnU-Net, Decathlon, MONAI lists, TotalSegmentator, MedSAM npz, DAVIS frames,
    videos, image and mask folders, DICOM; a manifest for all else. A folder may hold several data sets.

    [bold]Examples[/bold]

      $ medsam2 prepare data/ --out shards/ --dry-run
      $ medsam2 prepare Dataset007 --out shards/ --window -160:240 --split 0.7,0.3 --instances tumour
      $ medsam2 prepare clips/ --out s3://bucket/shards --modality US --dask tcp://scheduler:8786 --staging /shared/tmp
      $ medsam2 prepare --out shards/ --remove-patient smith_007
      $ medsam2 prepare tars/ --index-only
    """
    if index_only:
        from medsam2.cli.index_only import run_index_only

        run_index_only(context, source, workers, force, dry_run, _bar())
        return
    if force:
        raise UserError("--force belongs to --index-only; a prepare never replaces shards.")
    if not out:
        raise UserError("--out is missing: the folder (or URL) of the shards, e.g. --out shards/")
    if remove_patient:
        _remove(out, remove_patient)
        return
    if source is None:
        raise UserError("SOURCE is missing: the folder with the raw data, e.g. `medsam2 prepare data/ --out shards/`")
    options = _options(context.params)
    if dry_run:
        _dry_run(Path(source), out, options)
    else:
        _run(Path(source), out, options)


def _options(flags: dict[str, Any]) -> PrepareOptions:
    """The flags of the command (by the names of its parameters) as options: equal names mean the same."""
    from medsam2.shards.prepare import PrepareOptions
    from medsam2.shards.record import Codec
    from medsam2.shards.split import parse_shares
    from medsam2.shards.stage import Recipe

    codecs = get_args(Codec)
    if flags["codec"] not in codecs:
        hint = did_you_mean(flags["codec"], codecs)
        raise UserError(f"--codec {flags['codec']!r} is not one of {', '.join(codecs)}.{hint}")

    def of(settings: type[Any]) -> dict[str, Any]:
        return {field.name: flags[field.name] for field in fields(settings) if field.name in flags}

    computed = {
        "recipe": Recipe(**of(Recipe)),
        "book": _book(flags),
        "shares": parse_shares(flags["split"]),
        "workers": flags["workers"] or len(os.sched_getaffinity(0)),
    }
    return PrepareOptions(**of(PrepareOptions) | computed)


def _book(flags: dict[str, Any]) -> SettingsBook:
    """The settings of the yaml under what the flags say for all data sets; `instances` are added to its label rules."""
    from medsam2.cases.settings import DatasetSettings, check_window, read_settings

    names = ("patient", "axis", "channels", "threshold", "min_voxels", "min_pixels", "licence")
    common = {name: flags[name] for name in names}
    common |= {"source": flags["source_name"], "allow_gaps": flags["allow_gaps"] or None}
    try:
        windows = [check_window(text) for text in flags["window"] or ()]
    except ValueError as error:
        raise UserError(f"--window: {error}") from None
    if windows:
        common |= {"window": windows[0]} if len(windows) == 1 else {"windows": windows}
    book = read_settings(flags["config"], common)
    if not flags["instances"]:
        return book
    settings = book.common.model_dump(exclude_unset=True)
    labels = settings.get("labels", {})
    labels = {**labels, "instances": tuple(dict.fromkeys([*labels.get("instances", ()), *flags["instances"]]))}
    return book.model_copy(update={"common": DatasetSettings.model_validate({**settings, "labels": labels})})


def _run(source: Path, out: str, options: PrepareOptions) -> None:
    from medsam2.shards.prepare import Watch
    from medsam2.shards.prepare import prepare as run

    progress = _bar()
    task = progress.add_task("starting", total=None, failed=0, unit="cases")

    class Screen(Watch):
        def planned(self, plan: Plan) -> None:
            print("\n".join(plan.datasets))
            progress.start()

        def progressed(self, step: str, done: int, total: int, failed: int) -> None:
            if progress.tasks[0].description != step:
                unit = "shards" if step in ("writing", "sending") else "cases"
                progress.reset(task, description=step, total=total, failed=failed, unit=unit)
            progress.update(task, completed=done, total=total, failed=failed)

    try:
        result = run(source, out, options, Screen())
    finally:
        progress.stop()
    _report(result)


def _dry_run(source: Path, out: str, options: PrepareOptions) -> None:
    from medsam2.cli.cases import print_surveys
    from medsam2.shards.folder import open_output, read_published
    from medsam2.shards.plan import make_plan

    read_published(open_output(out, options.staging), options.configuration())
    plan = make_plan(source.absolute() if options.dask else source, options)
    print("\n".join(plan.datasets))
    splits = {(job.ref.dataset, job.ref.case_id): job.split for job in plan.jobs}
    print_surveys(survey_cases([job.ref for job in plan.jobs], options.workers, options.dask), splits)
    for about, note in plan.notes:
        print(f"note: {about}: {note}")
    if plan.left_out:
        print(f"{plan.left_out} cases are in no list of the split file and would be left out.")
    print("Nothing was written (--dry-run).")


def survey_cases(refs: Sequence[CaseRef], max_processes: int, dask: str | None = None) -> list[CaseSurvey]:
    """Read all cases, under a progress bar, and describe each, in the order of `refs`."""
    from medsam2.shards.inspect import CaseSurvey, survey_case
    from medsam2.shards.pool import KILLED, choose_workers

    surveys: dict[int, CaseSurvey] = {}
    with _bar() as progress:
        task = progress.add_task("reading", total=len(refs), failed=0, unit="cases")
        for ref, survey in choose_workers(refs, max_processes, dask).run(survey_case, refs):
            surveys[id(ref)] = survey or CaseSurvey(ref, error=KILLED)
            progress.update(task, completed=len(surveys), failed=sum(bool(s.error) for s in surveys.values()))
    return [surveys[id(ref)] for ref in refs]


def _remove(out: str, names: list[str]) -> None:
    from medsam2.shards.remove import remove_patients

    removed = remove_patients(out, names)
    print(
        f"{removed.cases} cases ({removed.segments} segments) were taken out of {out}; {removed.shards} shards that "
        "held them were replaced or deleted."
    )


def _bar() -> Progress:
    """On stderr; a task needs `unit` and `failed`."""
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[unit]}, {task.fields[failed]} failed"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _report(result: Prepared) -> None:
    for name, note in result.notes[:MAX_NOTES]:
        print(f"note: {name}: {note}")
    if len(result.notes) > MAX_NOTES:
        print(f"... and {len(result.notes) - MAX_NOTES} more notes.")
    for failure in result.failures[:MAX_NOTES]:
        print(f"failed: {failure.job.name}: {failure.error}")
    print(
        f"{result.where} is complete already; nothing was done."
        if result.complete_before
        else f"{result.num_cases} cases were prepared."
    )
    if result.left_out:
        print(f"{result.left_out} cases are in no list of the split file and were left out.")
    if failed := result.summary["failed_cases"]:
        print(f"{failed} cases failed and are not in the shards: {result.failures_file} has reasons and remedies.")
    print_shards(result.summary)
    print_next(result.where)


def print_shards(summary: Mapping[str, Any]) -> None:
    """What the shards hold, from the content of `index.json`, and cases that leak from one split to another."""
    for group in summary["groups"]:
        counts = ", ".join(f"{group[name]:,} {name}" for name in ("patients", "cases", "segments", "objects", "frames"))
        print(f"{group['dataset']}, {group['modality']}, {group['split']}: {counts}, {group['bytes'] / 1e6:,.1f} MB")
    for same in summary["duplicates_across_splits"][:MAX_NOTES]:
        print(f"warning: the same voxels are in two splits: cases {', '.join(same)}")


def print_next(shards: str) -> None:
    """The commands that come after shards were written."""
    print(
        f"Next: medsam2 inspect {shards}\n"
        f"      python train.py experiment=quickstart data.shards={shards} output=runs/first"
    )
