"""`medsam2 export`: write a checkpoint in formats that other tools open, and prove that they do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsam2.export.targets import listed

if TYPE_CHECKING:
    from rich.console import Console

    from medsam2.export.targets import ExportResult


def export(
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", help="A run folder, a .ckpt or .pt file, or 'nano' (shipped).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it must not exist yet.")],
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to", help=f"The format, several (--to sam2,onnx) or all (a release): {listed()}. Default sam2."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in --out.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load the result with the consumer's code and compare masks.")
    ] = True,
    case: Annotated[
        str | None, typer.Option("--case", help="Compare on a held-out case of these shards: SHARDS or SHARDS:KEY.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="An evaluation folder of these weights, for the model card.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="ema or raw, of a run that averaged its weights. Default ema.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, or bf16: weights rounded to bfloat16.")] = "fp32",
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", help="Side of the model's input in px; the checkpoint's own by default."),
    ] = None,
) -> None:
    """Write a checkpoint in formats that other tools open.

    Each result is loaded by its consumer's own code in a process of its own, which must give the masks that medsam2
    gives; else nothing is written. The card README.md in the folder has the lines that load it. Several formats go into
    a sub-folder each; [cyan]--to all[/cyan] makes a release folder with licence, checksums and usage.md.

    [bold]Examples[/bold]

      $ medsam2 export --checkpoint runs/first --to sam2 --out exported
      $ medsam2 export -c nano --to sam2 -o nano_official
      $ medsam2 export -c runs/first --to adapter -o exported_adapter
      $ medsam2 export -c runs/first --to huggingface,onnx -o exported --case runs/shards --force
      $ medsam2 export -c runs/first --to all -o release --scores runs/first-scores
    """
    from rich.console import Console

    from medsam2.errors import UserError
    from medsam2.export.release import ALL, release_names, split_names, write_several
    from medsam2.export.run import refuse_existing
    from medsam2.export.targets import find_target
    from medsam2.export.variants import Variant, load_variant

    names = split_names(to or ["sam2"])
    if case and not verify:
        raise UserError("--case is what is compared on, and --no-verify compares nothing: leave one of them out.")
    variant = Variant(weights, dtype, image_size)  # type: ignore[arg-type]  # it checks the words itself
    refuse_existing(out, force)
    console = Console()
    with console.status(f"exporting {checkpoint} to {', '.join(names)}" + (" and comparing masks" if verify else "")):
        loaded = load_variant(checkpoint, variant)
        release = names == [ALL]
        if release or len(names) > 1:
            chosen = release_names(loaded) if release else names
            results = write_several(loaded, chosen, out, force, verify, case, scores, release)
        else:
            export_one = find_target(names[0]).exporter()
            results = [export_one(loaded, out, force=force, verify=verify, case=case, scores=scores)]
    for result in results:
        _report(console, result)
    if release:
        console.print(f"wrote README.md, LICENSE, usage.md and SHA256SUMS to {out}", highlight=False, soft_wrap=True)


def _report(console: Console, result: ExportResult) -> None:
    console.print(f"wrote {', '.join(result.files)} to {result.folder}", highlight=False, soft_wrap=True)
    report = result.report
    if not result.verified:
        return
    console.print(
        f"verified on {report['clip']}: largest difference of mask logits {report['max_logit_difference']:.3g}, of "
        f"object scores {report['max_score_difference']:.3g}, masks overlap by {report['iou']:.5f} (IoU)",
        highlight=False,
        soft_wrap=True,
    )
    if not report["foreground"]:
        console.print("[yellow]both masks are empty on that clip, which proves little: use --case SHARDS[/yellow]")
