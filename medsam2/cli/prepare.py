"""`medsam2 prepare`: raw data -> shards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medsam2.cli.console import progress_bar
from medsam2.errors import UserError, check_choice, explain_errors

if TYPE_CHECKING:
    from medsam2.cases.settings import SettingsBook
    from medsam2.shards.prepare.run import PrepareOptions, PrepareResult

MAX_NOTES = 20
INDEX_ONLY_FLAGS = ("source", "index_only", "workers", "force", "dry_run")
"""The parameters that mean something with --index-only: the json of a sample says all else."""
Text = str | None
Texts = list[str] | None
File = Path | None


@explain_errors
def prepare(
    context: typer.Context,
    source: Annotated[Text, typer.Argument(help="A folder with one or several data sets, or one file.")] = None,
    out: Annotated[str, typer.Option(help="Folder for the shards, or any fsspec URL, e.g. s3://...")] = "",
    layout: Annotated[Text, typer.Option(help="Take this layout for all, where it is not recognised.")] = None,
    modality: Annotated[Text, typer.Option(help="CT, MR, PT, US, ENDOSCOPY, XRAY, ... for all cases.")] = None,
    config: Annotated[
        File, typer.Option(help="Yaml with settings for each data set: docs/how-to/prepare-data.md.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases and their errors; write nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first case that fails.")] = False,
    split: Annotated[str, typer.Option(help="Shares of train,val[,test], by patient.")] = "0.8,0.2",
    split_file: Annotated[File, typer.Option(help='Json {"train": [...], "val": [...]} of names.')] = None,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    exclude_patients: Annotated[File, typer.Option(help="Patients to leave out: a text file, a name a line.")] = None,
    patient: Annotated[Text, typer.Option(help="Regular expression with (?P<patient>...) for names.")] = None,
    window: Annotated[Texts, typer.Option(help="LO:HI in HU, lung, dicom, percentiles, ...; repeatable.")] = None,
    axis: Annotated[Text, typer.Option(help="Slice along auto, x (sagittal), y (coronal) or z (axial).")] = None,
    channels: Annotated[Text, typer.Option(help="Of several image files a case: each, first or rgb.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Foreground of probability maps and JPEG masks.")] = None,
    instances: Annotated[Texts, typer.Option(help="Structure whose connected parts are objects; repeatable.")] = None,
    min_voxels: Annotated[int | None, typer.Option(help="Of an object in its whole case.")] = None,
    min_pixels: Annotated[int | None, typer.Option(help="Of an object's largest slice; smaller are dropped.")] = None,
    allow_gaps: Annotated[bool, typer.Option("--allow-gaps", help="Read DICOM series with missing slices.")] = False,
    source_name: Annotated[Text, typer.Option(help="Where the data come from, for cards.")] = None,
    licence: Annotated[Text, typer.Option(help="Of the data, for cards.")] = None,
    codec: Annotated[str, typer.Option(help="zstd, lz4, png or jpeg.")] = "zstd",
    max_side: Annotated[int, typer.Option(help="Larger frames are reduced to this.", min=32)] = 1024,
    segment: Annotated[int, typer.Option(help="Most frames of a training segment.", min=1)] = 64,
    workers: Annotated[int, typer.Option(help="Most processes, a case each; 0: one a core.", min=0)] = 0,
    dask: Annotated[Text, typer.Option(help="Scheduler, e.g. tcp://10.0.0.5:8786, whose workers do the work.")] = None,
    staging: Annotated[File, typer.Option(help="Where cases are until they are joined; Dask workers share it.")] = None,
    remove_patient: Annotated[
        Texts, typer.Option(help="Take this patient out of --out, without SOURCE; repeatable.")
    ] = None,
    index_only: Annotated[
        bool, typer.Option("--index-only", help="Index .tar files: docs/how-to/index-tars.md")
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
        _index_only(context, source, workers, force, dry_run)
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
    from medsam2.shards.prepare.run import PrepareOptions
    from medsam2.shards.prepare.split import parse_shares
    from medsam2.shards.prepare.stage import Recipe
    from medsam2.shards.record import EXTENSIONS

    check_choice("--codec", flags["codec"], EXTENSIONS)

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
    from medsam2.shards.prepare.run import prepare as run

    with progress_bar() as show:

        def follow(step: str, done: int, total: int, failed: int) -> None:
            show(f"{step}, {failed} failed" if failed else step, done, total)

        result = run(source, out, options, lambda plan: print("\n".join(plan.datasets)), follow)
    _report(result)


def _dry_run(source: Path, out: str, options: PrepareOptions) -> None:
    from medsam2.cli.inspect import print_surveys, survey_cases
    from medsam2.shards.prepare.folder import open_output, read_published
    from medsam2.shards.prepare.plan import make_plan

    read_published(open_output(out, options.staging), options.configuration())
    plan = make_plan(source.absolute() if options.dask else source, options)
    print("\n".join(plan.datasets))
    splits = {(job.ref.dataset, job.ref.case_id): job.split for job in plan.jobs}
    print_surveys(survey_cases([job.ref for job in plan.jobs], options.workers, options.dask), splits)
    for about, note in plan.notes:
        print(f"note: {about}: {note}")
    if plan.num_left_out:
        print(f"{plan.num_left_out} cases are in no list of the split file and would be left out.")
    print("Nothing was written (--dry-run).")


def _remove(out: str, names: list[str]) -> None:
    from medsam2.shards.prepare.remove import remove_patients

    removed = remove_patients(out, names)
    print(
        f"{removed.cases} cases ({removed.segments} segments) were taken out of {out}; {removed.shards} shards that "
        "held them were replaced or deleted."
    )


def _index_only(context: typer.Context, source: str | None, workers: int, force: bool, dry_run: bool) -> None:
    """Write the index of tars that have none, and print what they hold; `context` knows which flags were typed."""
    from medsam2.shards.index_tars import index_tars

    for parameter in context.command.params:
        typed = getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
        if typed and parameter.name not in INDEX_ONLY_FLAGS:
            raise UserError(f"{parameter.opts[0]} does not go with --index-only, which changes no tar; leave it out.")
    if source is None:
        raise UserError("SOURCE is missing: the folder or URL of the tars, e.g. `medsam2 prepare tars/ --index-only`")
    workers = workers or len(os.sched_getaffinity(0))
    with progress_bar() as show:
        summary = index_tars(source, workers, force, dry_run, lambda done, total: show("indexing", done, total))
    _print_shards(summary)
    if summary["failed_cases"]:
        print(f"{summary['failed_cases']:,} samples without a labelled structure were left out.")
    print("Nothing was written (--dry-run).") if dry_run else _print_next(source)


def _report(result: PrepareResult) -> None:
    for name, note in result.notes[:MAX_NOTES]:
        print(f"note: {name}: {note}")
    if len(result.notes) > MAX_NOTES:
        print(f"... and {len(result.notes) - MAX_NOTES} more notes.")
    for failure in result.failures[:MAX_NOTES]:
        print(f"failed: {failure.job.name}: {failure.error}")
    print(
        f"{result.where} is complete already; nothing was done."
        if result.already_complete
        else f"{result.num_cases} cases were prepared."
    )
    if result.num_left_out:
        print(f"{result.num_left_out} cases are in no list of the split file and were left out.")
    if failed := result.summary["failed_cases"]:
        print(f"{failed} cases failed and are not in the shards: {result.failures_file} has reasons and remedies.")
    _print_shards(result.summary)
    _print_next(result.where)


def _print_shards(summary: Mapping[str, Any]) -> None:
    """What the shards hold, from the content of `index.json`, and cases that leak from one split to another."""
    for group in summary["groups"]:
        counts = ", ".join(f"{group[name]:,} {name}" for name in ("patients", "cases", "segments", "objects", "frames"))
        print(f"{group['dataset']}, {group['modality']}, {group['split']}: {counts}, {group['bytes'] / 1e6:,.1f} MB")
    for same in summary["duplicates_across_splits"][:MAX_NOTES]:
        print(f"warning: the same voxels are in two splits: cases {', '.join(same)}")


def _print_next(shards: str) -> None:
    """The commands that come after shards were written."""
    print(
        f"Next: medsam2 inspect {shards}\n"
        f"      python train.py experiment=quickstart data.shards={shards} output=runs/first"
    )
