"""`medsam2 demo`: generated data in real file formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medsam2.errors import explain_errors

app = typer.Typer(
    help="Write generated data to try every command on.",
    epilog="Example:  medsam2 demo cases demo --cases 8",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

EPILOG = """Examples:

    medsam2 demo cases demo                        # 8 cases for each of four modalities

    medsam2 demo cases rings --only wall           # every case has labels of the ring family only

    medsam2 demo cases others --without wall       # no image shows a ring

    medsam2 demo cases ct --modality CT --cases 20 --seed 7
"""


@app.callback()
def demo() -> None:
    """Write generated data to try every command on."""


@app.command("cases", epilog=EPILOG)
@explain_errors
def cases(
    out: Annotated[Path, typer.Argument(help="Folder to create; it must not exist or be empty.")],
    count: Annotated[int, typer.Option("--cases", help="Number of cases per modality.")] = 8,
    seed: Annotated[int, typer.Option(help="The same seed writes the same cases.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Only family to label, in every case; repeatable.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Family to leave out of all images; repeatable.")] = None,
    modality: Annotated[
        list[str] | None, typer.Option(help="CT, MR, US or ENDOSCOPY; repeatable. Default: all.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Number of processes. Default: one per core.")] = None,
) -> None:
    """Write generated scans and clips with labels: CT- and MR-like NIfTI (nnU-Net raw), ultrasound-like frames,
    endoscopy-like MP4. Families: organ, kidney, lesion, vessel, wall (a ring), instrument.
    """
    from medsam2.cli.console import progress_bar
    from medsam2.demo.phantoms import write_cases

    families, modalities = (tuple(only or ()), tuple(without or ())), tuple(modality or ())
    with progress_bar() as show:
        written = write_cases(
            out, count, seed, *families, modalities, workers, lambda done, total: show("generating cases", done, total)
        )
    for name, (folder, labels) in written.items():
        print(f"{count:4d} {name:<10} {folder}  labels: {', '.join(labels)}")
    print(f"next: medsam2 prepare {out} --out {out.with_name(out.name + '-shards')}")
