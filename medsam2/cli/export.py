"""`medsam2 export`: write a checkpoint in formats of other tools, and verify the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medsam2.export.targets import ALL, describe_targets, split_names


def export(
    checkpoint: Annotated[str, typer.Option("--checkpoint", "-c", help="A run folder, .ckpt or .pt file, or 'nano'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it must not exist yet.")],
    to: Annotated[
        list[str] | None,
        typer.Option(help=f"One, several (--to sam2,onnx) or all: {describe_targets()}. Default sam2."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in --out.")] = False,
    verify: Annotated[bool, typer.Option(help="Load the result with the consumer's code and compare masks.")] = True,
    case: Annotated[str | None, typer.Option(help="Compare on a held-out case: SHARDS or SHARDS:KEY.")] = None,
    scores: Annotated[Path | None, typer.Option(help="An evaluation folder of these weights, for the card.")] = None,
    weights: Annotated[str | None, typer.Option(help="ema or raw, for a run with averaged weights.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16: weights rounded to bfloat16.")] = "fp32",
    image_size: Annotated[int | None, typer.Option(help="Side of the model's input, in pixels.")] = None,
) -> None:
    """Write a checkpoint in formats of other tools.

    The consumer's code loads each result in a separate process and must produce the same masks as medsam2; otherwise
    nothing is written. The card README.md in the folder shows how to load it. With several formats, each has a
    subfolder; [cyan]--to all[/cyan] creates a release folder with licence, checksums and one card.

    [bold]Examples[/bold]

      $ medsam2 export --checkpoint runs/first --to sam2 --out exported
      $ medsam2 export -c nano --to sam2 -o nano_official
      $ medsam2 export -c runs/first --to adapter -o exported_adapter
      $ medsam2 export -c runs/first --to huggingface,onnx -o exported --case runs/shards --force
      $ medsam2 export -c runs/first --to all -o release --scores runs/first-scores
    """
    from rich.console import Console

    from medsam2.errors import UserError
    from medsam2.export.run import export_model, refuse_existing
    from medsam2.export.variants import load_variant

    names = split_names(to or ["sam2"])
    if case and not verify:
        raise UserError("--case names the data to compare on, but --no-verify compares nothing: remove one of them.")
    refuse_existing(out, force)
    console = Console()
    with console.status(f"exporting {checkpoint} to {', '.join(names)}" + (" and comparing masks" if verify else "")):
        model = load_variant(checkpoint, weights, dtype, image_size)
        results = export_model(model, names, out, force=force, verify=verify, case=case, scores=scores)
    lines = [line for result in results for line in result.lines()]
    if names == [ALL]:
        lines.append(f"wrote README.md, LICENSE and SHA256SUMS to {out}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
