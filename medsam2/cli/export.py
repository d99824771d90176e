"""`medsam2 export`: write a checkpoint in a format that other tools open, and prove that they do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medsam2.export.targets import find_target, listed


def export(
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", help="A run folder, a .ckpt or .pt file, or 'nano' (shipped).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it must not exist yet.")],
    to: Annotated[str, typer.Option("--to", help=f"The format: {listed()}.")] = "sam2",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in --out.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load the result with the consumer's code and compare masks.")
    ] = True,
    case: Annotated[
        str | None, typer.Option("--case", help="Compare on a held-out case of these shards: SHARDS or SHARDS:KEY.")
    ] = None,
) -> None:
    """Write a checkpoint in a format that other tools open.

    The result is loaded by the consumer's own code, which must give the masks that medsam2 gives; else nothing is
    written. The card README.md in the folder has the lines that load it.

    [bold]Examples[/bold]

      $ medsam2 export --checkpoint runs/first --to sam2 --out exported
      $ medsam2 export -c nano --to sam2 -o nano_official
      $ medsam2 export -c runs/first --to adapter -o exported_adapter
      $ medsam2 export -c runs/first -o exported --case runs/shards --force
    """
    from rich.console import Console

    from medsam2.errors import UserError

    target = find_target(to)
    if case and not verify:
        raise UserError("--case is what is compared on, and --no-verify compares nothing: leave one of them out.")
    console = Console()
    with console.status(f"exporting {checkpoint} to {target.name}" + (" and comparing masks" if verify else "")):
        result = target.exporter()(checkpoint, out, force=force, verify=verify, case=case)
    console.print(f"wrote {', '.join(result.files)} to {result.folder}", highlight=False, soft_wrap=True)
    report = result.report
    if result.verified:
        console.print(
            f"verified on {report['clip']}: largest difference of mask logits {report['max_logit_difference']:.3g}, of "
            f"object scores {report['max_score_difference']:.3g}, masks overlap by {report['iou']:.5f} (IoU)",
            highlight=False,
            soft_wrap=True,
        )
        if not report["foreground"]:
            console.print("[yellow]both masks are empty on that clip, which proves little: use --case SHARDS[/yellow]")
