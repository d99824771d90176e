"""`medsam2 prepare`: raw data -> shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsam2.errors import UserError, did_you_mean, explain_errors

if TYPE_CHECKING:
    from rich.progress import Progress

    from medsam2.shards.prepare import Prepared, PrepareOptions

CODECS = ("zstd", "lz4", "png", "jpeg")


@explain_errors
def prepare(
    source: Annotated[Path, typer.Argument(help="A folder with one or several data sets, or one npz file.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the shards.")],
    layout: Annotated[str | None, typer.Option(help="nnunet_raw, medsam_npz, davis_frames, video_masks.")] = None,
    modality: Annotated[str | None, typer.Option(help="CT, MR, PT, US, ENDOSCOPY, XRAY, ... for all cases.")] = None,
    window: Annotated[
        str | None, typer.Option(help="CT window LO:HI in HU, or abdomen, lung, brain, mediastinum, bone.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases and their errors; write nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first case that fails.")] = False,
    split: Annotated[str, typer.Option(help="Shares of train,val[,test], by patient.")] = "0.8,0.2",
    split_file: Annotated[
        Path | None, typer.Option(help='Json {"train": [...], "val": [...]} of patient or case names.')
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes; 0 means one a core.", min=0)] = 0,
    codec: Annotated[str, typer.Option(help="zstd, lz4, png or jpeg.")] = "zstd",
    max_side: Annotated[int, typer.Option(help="Larger frames are reduced to this.", min=32)] = 1024,
    min_pixels: Annotated[int, typer.Option(help="Of an object's largest slice; smaller ones are dropped.", min=1)] = 1,
    segment: Annotated[int, typer.Option(help="Most frames of a training segment.", min=1)] = 64,
) -> None:
    """Turn raw scans, clips and masks into shards for training.

    Layouts are recognised: nnU-Net raw, MedSAM npz, DAVIS frames, videos with mask frames. A folder may hold several.

    Examples:

      medsam2 prepare data/ --out shards/

      medsam2 prepare Dataset007 --out shards/ --window -160:240 --split 0.7,0.3

      medsam2 prepare clips/ --out shards/ --modality US --dry-run
    """
    from medsam2.cases.intensity import parse_window
    from medsam2.shards.prepare import PrepareOptions
    from medsam2.shards.prepare import prepare as run
    from medsam2.shards.split import parse_shares
    from medsam2.shards.stage import Recipe

    if codec not in CODECS:
        raise UserError(f"--codec {codec!r} is not one of {', '.join(CODECS)}.{did_you_mean(codec, CODECS)}")
    recipe = Recipe(
        codec=codec,  # type: ignore[arg-type]  # checked above
        window=parse_window(window) if window else None,
        max_side=max_side,
        min_pixels=min_pixels,
        segment=segment,
    )
    options = PrepareOptions(
        recipe=recipe,
        shares=parse_shares(split),
        split_file=split_file,
        seed=seed,
        layout=layout,
        modality=modality,
        workers=workers or len(os.sched_getaffinity(0)),
        strict=strict,
    )
    if dry_run:
        _dry_run(source, options)
        return
    with _bar() as progress:
        task = progress.add_task("preparing", total=None, failed=0)

        def tick(done: int, total: int, failed: int) -> None:
            progress.update(task, completed=done, total=total, failed=failed)

        result = run(source, out, options, tick)
    _report(result)


def _dry_run(source: Path, options: PrepareOptions) -> None:
    from medsam2.cli.inspect import print_cases
    from medsam2.shards.prepare import plan_jobs

    jobs, left_out = plan_jobs(source, options)
    splits = {(job.ref.dataset, job.ref.case_id): job.split for job in jobs}
    print_cases([job.ref for job in jobs], splits)
    if left_out:
        print(f"{left_out} cases are in no list of the split file and would be left out.")
    print("Nothing was written (--dry-run).")


def _bar() -> Progress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[failed]} failed"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _report(result: Prepared) -> None:
    from rich.table import Table

    from medsam2.cli.console import wide_console

    console = wide_console()
    for name, note in result.notes:
        console.print(f"note: {name}: {note}", style="yellow", markup=False, highlight=False)
    for failure in result.failures:
        ref = failure.job.ref
        text = f"failed: {ref.dataset}/{ref.case_id}: {failure.error}"
        console.print(text, style="red", markup=False, highlight=False)
    if result.complete_before:
        console.print(f"{result.folder} is complete already; nothing was done.", markup=False)
        if result.summary["failed_cases"]:
            failed = f"{result.summary['failed_cases']} cases failed then ({result.folder / 'failures.jsonl'})"
            console.print(f"{failed}; to try them again, prepare into a new folder.", markup=False)
    table = Table("dataset", "modality", "split")
    for name in ("patients", "cases", "segments", "objects", "frames", "MB"):
        table.add_column(name, justify="right")
    for group in result.summary["groups"]:
        numbers = [str(group[name]) for name in ("patients", "cases", "segments", "objects", "frames")]
        table.add_row(group["dataset"], group["modality"], group["split"], *numbers, f"{group['bytes'] / 1e6:.1f}")
    console.print(table)
    if result.failures:
        console.print(f"{len(result.failures)} cases failed: {result.folder / 'failures.jsonl'}", markup=False)
    if result.left_out:
        console.print(f"{result.left_out} cases are in no list of the split file and were left out.")
    for same in result.summary["duplicates_across_splits"]:
        console.print(f"warning: the same voxels stand in two splits: cases {', '.join(same)}", style="yellow")
    console.print(
        f"Next: medsam2 inspect {result.folder}\n"
        f"      python train.py experiment=quickstart data.shards={result.folder} output=runs/first",
        markup=False,
        highlight=False,
    )
