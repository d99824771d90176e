"""`medsam2 import`: convert a checkpoint of Meta, MedSAM2 or Hugging Face to our format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    source: Annotated[Path, typer.Argument(help="A .pt, .pth or .safetensors file, or a folder of transformers.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it must not exist yet.")],
    image_size: Annotated[int, typer.Option(help="Side of the model's input, if no yaml gives it.")] = 0,
    config: Annotated[Path | None, typer.Option(help="Yaml of the weights; default: the yaml beside them.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier import in --out.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare masks with Meta's code, and with transformers.")] = True,
    case: Annotated[str | None, typer.Option(help="Compare on a held-out case: SHARDS or SHARDS:KEY.")] = None,
) -> None:
    """Convert a checkpoint to our format: the official .pt and yaml, with a card.

    Names and shapes of the tensors reveal size and version. Missing and unexpected tensors are reported by name, and
    nothing is unpickled. Every other command accepts the new folder as a checkpoint.

    [bold]Examples[/bold]

      $ medsam2 import MedSAM2_latest.pt --out medsam2_512
      $ medsam2 import sam2.1-hiera-tiny/ --out tiny
      $ medsam2 import weights.safetensors --image-size 512 --out weights
    """
    from rich.console import Console

    from medsam2.errors import UserError
    from medsam2.export.importing.run import import_checkpoint
    from medsam2.export.verify.run import agreement

    if case and not verify:
        raise UserError("--case names the data to compare on, but --no-verify compares nothing: remove one of them.")
    console = Console()
    with console.status(f"reading {source}" + (" and comparing masks" if verify else "")):
        result = import_checkpoint(source, out, force, verify, image_size, config, case)
    lines = [f"found {result.external.describe()}", *(f"note: {note}" for note in result.external.notes)]
    if result.transformers:
        lines.append(agreement(result.transformers))
    for line in [*lines, *result.written.lines()]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
