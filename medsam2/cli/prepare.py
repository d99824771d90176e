"""`medsam2 prepare`: turn raw data into shards."""

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
"""The parameters that apply to --index-only; the json files of the samples give everything else."""
Text = str | None
Texts = list[str] | None
File = Path | None


@explain_errors
def prepare(
    context: typer.Context,
    source: Annotated[Text, typer.Argument(help="A folder with one or several datasets, or one file.")] = None,
    out: Annotated[str, typer.Option(help="Folder for the shards, or any fsspec URL, e.g. s3://...")] = "",
    layout: Annotated[Text, typer.Option(help="Layout of all datasets, if not recognised.")] = None,
    modality: Annotated[Text, typer.Option(help="Modality of all cases: CT, MR, PT, US, ENDOSCOPY, ...")] = None,
    config: Annotated[File, typer.Option(help="Yaml with settings per dataset: docs/how-to/prepare-data.md.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases and their errors; write nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first case that fails.")] = False,
    split: Annotated[str, typer.Option(help="Shares of train,val[,test], split by patient.")] = "0.8,0.2",
    split_file: Annotated[File, typer.Option(help='Json {"train": [...], "val": [...]} with names.')] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    exclude_patients: Annotated[File, typer.Option(help="Text file of patients to leave out, one per line.")] = None,
    patient: Annotated[Text, typer.Option(help="Regular expression for case names, with (?P<patient>...).")] = None,
    window: Annotated[Texts, typer.Option(help="LO:HI in HU, lung, dicom, percentiles, ...; repeatable.")] = None,
    axis: Annotated[Text, typer.Option(help="Slice along auto, x (sagittal), y (coronal) or z (axial).")] = None,
    channels: Annotated[Text, typer.Option(help="Use of several channels per case: each, first or rgb.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Lower limit of foreground in inexact masks.")] = None,
    instances: Annotated[Texts, typer.Option(help="Structure to split into components; repeatable.")] = None,
    min_voxels: Annotated[int | None, typer.Option(help="Smallest object, over the whole case.")] = None,
    min_pixels: Annotated[int | None, typer.Option(help="Smallest object, on its largest slice.")] = None,
    allow_gaps: Annotated[bool, typer.Option("--allow-gaps", help="Read DICOM series with missing slices.")] = False,
    source_name: Annotated[Text, typer.Option(help="Source of the data, for model cards.")] = None,
    licence: Annotated[Text, typer.Option(help="Licence of the data, for model cards.")] = None,
    codec: Annotated[str, typer.Option(help="Compression of frames: zstd, lz4, png or jpeg.")] = "zstd",
    max_side: Annotated[int, typer.Option(help="Longest side of stored frames, in pixels.", min=32)] = 1024,
    segment: Annotated[int, typer.Option(help="Largest number of frames per training segment.", min=1)] = 64,
    workers: Annotated[int, typer.Option(help="Number of processes; 0: one per core.", min=0)] = 0,
    dask: Annotated[Text, typer.Option(help="Address of a Dask scheduler, e.g. tcp://10.0.0.5:8786.")] = None,
    staging: Annotated[File, typer.Option(help="Folder for temporary files, shared with Dask workers.")] = None,
    remove_patient: Annotated[
        Texts, typer.Option(help="Remove this patient from --out, without SOURCE; repeatable.")
    ] = None,
    index_only: Annotated[
        bool, typer.Option("--index-only", help="Index .tar files: docs/how-to/index-tars.md")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="With --index-only: replace an index.")] = False,
) -> None:
    """Turn raw scans, clips, stills and masks into shards. Run the same command again to resume after an interruption.

    Layouts are recognised: nnU-Net, Decathlon, MONAI lists, TotalSegmentator, MedSAM npz, DAVIS frames, videos, image
    and mask folders, DICOM. Describe other data in a manifest. A folder may hold several datasets.

    [bold]Examples[/bold]

      $ medsam2 prepare data/ --out shards/ --dry-run
      $ medsam2 prepare Dataset007 --out shards/ --window -160:240 --split 0.7,0.3 --instances tumour
      $ medsam2 prepare clips/ --out s3://bucket/shards --modality US --dask tcp://scheduler:8786 --staging /shared/tmp
      $ medsam2 prepare --out shards/ --remove-patient smith_007
      $ medsam2 prepare tars/ --index-only
    """
    _prepare(context)


def _prepare(context: typer.Context) -> None:
    """Check which flags go together, and run the action that they request."""
    flags = context.params
    source, out = flags["source"], flags["out"]
    if flags["index_only"]:
        _index_only(context)
        return
    if flags["force"]:
        raise UserError("--force applies only to --index-only; prepare never replaces shards.")
    if not out:
        raise UserError("--out is missing: the folder (or URL) of the shards, e.g. --out shards/")
    if flags["remove_patient"]:
        _remove(out, flags["remove_patient"])
        return
    if source is None:
        raise UserError("SOURCE is missing: the folder with the raw data, e.g. `medsam2 prepare data/ --out shards/`")
    run = _dry_run if flags["dry_run"] else _run
    run(Path(source), out, _options(flags))


def _options(flags: dict[str, Any]) -> PrepareOptions:
    """Convert the command's flags to options; flags and fields of equal name correspond."""
    from medsam2.shards.prepare.run import PrepareOptions
    from medsam2.shards.prepare.split import parse_shares
    from medsam2.shards.prepare.stage import Recipe
    from medsam2.shards.record import EXTENSIONS

    check_choice("--codec", flags["codec"], EXTENSIONS)

    def select(options: type[Any]) -> dict[str, Any]:
        return {field.name: flags[field.name] for field in fields(options) if field.name in flags}

    computed = {
        "recipe": Recipe(**select(Recipe)),
        "book": _book(flags),
        "shares": parse_shares(flags["split"]),
        "workers": flags["workers"] or len(os.sched_getaffinity(0)),
    }
    return PrepareOptions(**select(PrepareOptions) | computed)


def _book(flags: dict[str, Any]) -> SettingsBook:
    """Read the yaml and apply the flags to all datasets; `instances` extend the label rules of the yaml."""
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

        def report_progress(step: str, done: int, total: int, failed: int) -> None:
            show(f"{step}, {failed} failed" if failed else step, done, total)

        result = run(source, out, options, lambda plan: print("\n".join(plan.datasets)), report_progress)
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
    for name, note in plan.notes:
        print(f"note: {name}: {note}")
    if plan.num_left_out:
        print(f"{plan.num_left_out} cases are not in the split file and would be left out.")
    print("Nothing was written (--dry-run).")


def _remove(out: str, names: list[str]) -> None:
    from medsam2.shards.prepare.remove import remove_patients

    removed = remove_patients(out, names)
    print(
        f"{removed.cases} cases ({removed.segments} segments) were removed from {out}; {removed.shards} shards with "
        "them were replaced or deleted."
    )


def _index_only(context: typer.Context) -> None:
    """Write the index of tars without one, and print their content. The context knows which flags the user typed."""
    from medsam2.shards.index_tars import index_tars

    source, force, dry_run = (context.params[name] for name in ("source", "force", "dry_run"))

    for parameter in context.command.params:
        typed = getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
        if typed and parameter.name not in INDEX_ONLY_FLAGS:
            raise UserError(f"{parameter.opts[0]} cannot be used with --index-only, which changes no tar; remove it.")
    if source is None:
        raise UserError("SOURCE is missing: the folder or URL of the tars, e.g. `medsam2 prepare tars/ --index-only`")
    workers = context.params["workers"] or len(os.sched_getaffinity(0))
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
        print(f"{result.num_left_out} cases are not in the split file and were left out.")
    if failed := result.summary["failed_cases"]:
        print(f"{failed} cases failed and are not in the shards: {result.failures_file} has reasons and remedies.")
    _print_shards(result.summary)
    _print_next(result.where)


def _print_shards(summary: Mapping[str, Any]) -> None:
    """Print the content of the shards from `index.json`, and cases that leak from one split to another."""
    for group in summary["groups"]:
        counts = ", ".join(f"{group[name]:,} {name}" for name in ("patients", "cases", "segments", "objects", "frames"))
        print(f"{group['dataset']}, {group['modality']}, {group['split']}: {counts}, {group['bytes'] / 1e6:,.1f} MB")
    for same in summary["duplicates_across_splits"][:MAX_NOTES]:
        print(f"warning: two splits hold the same voxels: cases {', '.join(same)}")


def _print_next(shards: str) -> None:
    """Print the next commands to run."""
    print(
        f"Next: medsam2 inspect {shards}\n"
        f"      python train.py experiment=quickstart data.shards={shards} output=runs/first"
    )
