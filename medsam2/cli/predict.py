"""`medsam2 predict`: segment scans and videos from prompts; masks have the grid of the input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medsam2.errors import UserError, explain_errors

if TYPE_CHECKING:
    from medsam2.inference.scans.predict import Written

Texts = list[str] | None
SCAN_FLAGS = ("modality", "window", "axis", "allow_gaps", "nonfinite", "threshold")
DIRECTIONS = ("both", "forward", "backward", "both_apart", "front_to_end")


@explain_errors
def predict(
    context: typer.Context,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT", help="Volumes, DICOM folders, videos, folders of frames, pictures.", show_default=False
        ),
    ],
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", help="A run folder, a .ckpt or .pt file, or 'nano' (shipped).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, or a folder.")],
    box: Annotated[Texts, typer.Option(metavar="Z,X0,Y0,X1,Y1[,OBJECT]", help="A box; repeatable.")] = None,
    point: Annotated[Texts, typer.Option(metavar="Z,X,Y[,1|0][,OBJECT]", help="A click: 1 inside, 0 outside.")] = None,
    recist: Annotated[Texts, typer.Option(metavar="Z,X0,Y0,X1,Y1[,OBJECT]", help="A longest diameter.")] = None,
    mask: Annotated[list[Path] | None, typer.Option(help="A label map on the scan's grid; labels are objects.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Json file of prompts: docs/how-to/predict.md.")] = None,
    direction: Annotated[str, typer.Option(help=f"{', '.join(DIRECTIONS)}: docs/reference/protocols.md.")] = "both",
    format: Annotated[str, typer.Option(help="nifti, nrrd, mha, dicom-seg, frames, png, mp4; default: by --out.")] = "",
    per_object: Annotated[
        bool, typer.Option("--per-object", help="Write one file per object to the folder --out; keeps overlaps.")
    ] = False,
    modality: Annotated[str, typer.Option(help="CT, MR, PT, US, ...: how intensities are scaled.")] = "",
    window: Annotated[str | None, typer.Option(help="LO:HI in HU, a preset (lung, ...), dicom or percentiles.")] = None,
    axis: Annotated[str, typer.Option(help="Slice along the file's third index, or auto, x, y, z.")] = "file",
    allow_gaps: Annotated[bool, typer.Option("--allow-gaps", help="Read DICOM series with missing slices.")] = False,
    nonfinite: Annotated[float | None, typer.Option(help="Replacement of NaN and infinite voxels.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Lower limit of foreground in inexact --mask files.")] = None,
    memory: Annotated[str, typer.Option(help="One of configs/memory/; default: the checkpoint's.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (autocast).")] = "fp32",
    batch_frames: Annotated[int, typer.Option(help="Frames in one call of the image encoder.", min=1)] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace existing masks.")] = False,
) -> None:
    """Segment volumes and videos from a few prompts; masks have the input's grid and orientation.

    Z, X, Y count voxels of the file from 0: Z along its third index (slices of a DICOM series in space, frames of a
    video), X and Y along the other two in the file's order. That is K, I, J of 3D Slicer, [Z, Y, X] of SimpleITK and
    the i, j, k of nibabel as X, Y, Z; ITK-SNAP counts from 1. Box corners are the outermost pixels inside.

    OBJECT names the object of a prompt; prompts of the same name belong to one object. If objects overlap in a label
    map, the higher logit takes the voxel.

    [bold]Examples[/bold]

      $ medsam2 predict ct.nii.gz -c nano --modality CT --box 12,40,52,88,97,liver --out liver.nii.gz
      $ medsam2 predict dicom_folder -c runs/first --recist 7,100,120,131,140,lesion --out lesion.dcm
      $ medsam2 predict clip.mp4 -c nano --point 0,210,140 --point 0,90,60,0 --out overlay.mp4
      $ medsam2 predict a.nrrd b.nrrd -c nano --modality MR --prompts prompts.json --out masks/ --per-object
    """
    _predict(context.params)


def _predict(flags: dict[str, Any]) -> None:
    """Convert the command's flags to settings of the same name, and predict."""
    from medsam2.cli.console import progress_bar
    from medsam2.config import validate
    from medsam2.inference.scans.predict import PredictSettings, predict_files
    from medsam2.inference.scans.prompts import from_flags

    settings = {name: flags[name] for name in PredictSettings.model_fields if name in flags}
    scan = {name: flags[name] for name in SCAN_FLAGS}
    checked = validate(PredictSettings, {**settings, "scan": scan}, "medsam2 predict")
    boxes, points, recists, masks = (flags[name] or () for name in ("box", "point", "recist", "mask"))
    prompts = from_flags(boxes, points, recists, masks, flags["prompts"])
    inputs, failed = flags["inputs"], 0
    with progress_bar() as show:
        for written in predict_files(inputs, prompts, checked, show):
            if written.error and len(inputs) == 1:
                raise UserError(written.error)
            failed += bool(written.error)
            _report(written)
    if failed:
        raise UserError(f"{failed} of {len(inputs)} inputs gave no masks: see above.")


def _report(written: Written) -> None:
    """Print files and sizes of the masks on stdout, and notes and errors on stderr."""
    for note in written.notes:
        print(f"note: {written.source}: {note}", file=sys.stderr)
    if written.error:
        print(f"failed: {written.error}", file=sys.stderr)
        return
    counts = ", ".join(f"{name} {count:,}" for name, count in zip(written.names, written.counts, strict=True))
    first, number = written.files[0], len(written.files)
    where = first if number == 1 else f"{number} files in {first.parent}"
    print(f"wrote {where}: {counts} voxels on {written.frames} frames in {written.seconds:.1f} s")
