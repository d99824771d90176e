"""`medsam2 prepare`: raw data -> shards."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medsam2.errors import UserError, did_you_mean, explain_errors

if TYPE_CHECKING:
    from rich.progress import Progress

    from medsam2.shards.prepare import Prepared, PrepareOptions

CODECS = ("zstd", "lz4", "png", "jpeg")
NOTES = 20
Texts = list[str] | None


@explain_errors
def prepare(
    source: Annotated[Path | None, typer.Argument(help="A folder with one or several data sets, or one file.")] = None,
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
    workers: Annotated[int, typer.Option(help="Processes; 0 means one a core.", min=0)] = 0,
    dask: Annotated[str | None, typer.Option(help="Scheduler of a Dask cluster that sees SOURCE and staging.")] = None,
    staging: Annotated[
        Path | None, typer.Option(help="Where cases are kept until the end; shared by all workers of a cluster.")
    ] = None,
    remove_patient: Annotated[
        Texts, typer.Option(help="Take a patient out of the shards at --out; repeatable, without SOURCE.")
    ] = None,
) -> None:
    """Turn raw scans, clips, stills and masks into shards for training; again, to add cases or try failed ones.

    Layouts are recognised and shown: nnU-Net, Decathlon, MONAI lists, TotalSegmentator, MedSAM npz, DAVIS frames, videos,
    image and mask folders, DICOM; a manifest for all else. A folder may hold several data sets.

    Examples:

      medsam2 prepare data/ --out shards/ --dry-run

      medsam2 prepare Dataset007 --out shards/ --window -160:240 --split 0.7,0.3 --instances tumour

      medsam2 prepare clips/ --out s3://bucket/shards --modality US --dask tcp://scheduler:8786 --staging /shared/tmp

      medsam2 prepare --out shards/ --remove-patient smith_007
    """
    if not out:
        raise UserError("--out is missing: the folder (or URL) of the shards, e.g. --out shards/")
    if remove_patient:
        _remove(out, remove_patient)
        return
    if source is None:
        raise UserError("SOURCE is missing: the folder with the raw data, e.g. `medsam2 prepare data/ --out shards/`")
    from medsam2.cases.settings import read_settings
    from medsam2.shards.prepare import PrepareOptions
    from medsam2.shards.split import parse_shares
    from medsam2.shards.stage import Recipe

    if codec not in CODECS:
        raise UserError(f"--codec {codec!r} is not one of {', '.join(CODECS)}.{did_you_mean(codec, CODECS)}")
    flags: dict[str, Any] = {
        "patient": patient, "axis": axis, "channels": channels, "threshold": threshold, "min_voxels": min_voxels,
        "min_pixels": min_pixels, "allow_gaps": allow_gaps or None, "source": source_name, "licence": licence,
        "window": window[0] if window and len(window) == 1 else None,
        "windows": tuple(window) if window and len(window) > 1 else None,
        "labels": {"instances": tuple(instances)} if instances else None,
    }  # fmt: skip
    options = PrepareOptions(
        recipe=Recipe(codec=codec, max_side=max_side, segment=segment),  # type: ignore[arg-type]  # checked above
        book=read_settings(config, flags),
        shares=parse_shares(split),
        split_file=split_file,
        seed=seed,
        layout=layout,
        modality=modality,
        workers=workers or len(os.sched_getaffinity(0)),
        dask=dask,
        staging=staging,
        strict=strict,
    )
    _dry_run(source, options) if dry_run else _run(source, out, options)


def _run(source: Path, out: str, options: PrepareOptions) -> None:
    from medsam2.shards.prepare import prepare as run

    with _bar() as progress:
        task = progress.add_task("finding", total=None, failed=0)

        def tick(done: int, total: int, failed: int) -> None:
            progress.update(task, description="preparing", completed=done, total=total, failed=failed)

        result = run(source, out, options, tick)
    _report(result)


def _dry_run(source: Path, options: PrepareOptions) -> None:
    from medsam2.cli.inspect import print_cases
    from medsam2.shards.prepare import plan_jobs

    plan = plan_jobs(source, options)
    splits = {(job.ref.dataset, job.ref.case_id): job.split for job in plan.jobs}
    for (dataset, layout), count in Counter((job.ref.dataset, job.ref.layout) for job in plan.jobs).items():
        print(f"{dataset}: {layout}, {count} cases")
    print_cases([job.ref for job in plan.jobs], splits)
    for warning in plan.warnings:
        print(f"note: {warning}")
    if plan.left_out:
        print(f"{plan.left_out} cases are in no list of the split file and would be left out.")
    print("Nothing was written (--dry-run).")


def _remove(out: str, names: list[str]) -> None:
    from medsam2.shards.remove import remove_patients

    removed = remove_patients(out, names)
    print(
        f"{removed.cases} cases ({removed.segments} segments) were taken out of {out}: "
        f"{len(removed.shards_rewritten)} shards written anew, {len(removed.shards_deleted)} deleted."
    )


def _bar() -> Progress:
    from rich import progress
    from rich.console import Console

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> str:
            return f"{task.speed:.1f} cases/s" if task.speed else ""

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        Rate(),
        progress.TextColumn("{task.fields[failed]} failed"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _report(result: Prepared) -> None:
    from rich.table import Table

    from medsam2.cli.console import wide_console

    console = wide_console()
    for name, note in result.notes[:NOTES]:
        console.print(f"note: {name}: {note}", style="yellow", markup=False, highlight=False)
    if len(result.notes) > NOTES:
        console.print(f"... and {len(result.notes) - NOTES} more notes.", style="yellow")
    for failure in result.failures[:NOTES]:
        ref = failure.job.ref
        text = f"failed: {ref.dataset}/{ref.case_id}: {failure.error}"
        console.print(text, style="red", markup=False, highlight=False)
    if result.complete_before:
        console.print(f"{result.where} is complete already; nothing was done.", markup=False)
    table = Table("dataset", "layout", "modality", "split")
    for name in ("patients", "cases", "segments", "objects", "frames", "MB"):
        table.add_column(name, justify="right")
    datasets = result.summary.get("datasets", {})
    for group in result.summary["groups"]:
        numbers = [str(group[name]) for name in ("patients", "cases", "segments", "objects", "frames")]
        layout = datasets.get(group["dataset"], {}).get("layout", "")
        names = (group["dataset"], layout, group["modality"], group["split"])
        table.add_row(*names, *numbers, f"{group['bytes'] / 1e6:.1f}")
    console.print(table)
    if result.failures:
        listed = f": {result.where}/failures.jsonl" if "://" not in result.where else "."
        console.print(f"{len(result.failures)} cases failed{listed} The same command tries them again.", markup=False)
    if result.left_out:
        console.print(f"{result.left_out} cases are in no list of the split file and were left out.")
    for same in result.summary["duplicates_across_splits"]:
        console.print(f"warning: the same voxels stand in two splits: cases {', '.join(same)}", style="yellow")
    console.print(
        f"Next: medsam2 inspect {result.where}\n"
        f"      python train.py experiment=quickstart data.shards={result.where} output=runs/first",
        markup=False,
        highlight=False,
    )
