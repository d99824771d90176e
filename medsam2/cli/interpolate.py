"""`medsam2 interpolate`: interpolate between the weights at the start and the end of a fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def interpolate(
    start: Annotated[str, typer.Argument(help="Weights before the fine-tuning, e.g. 'nano' or a .pt file.")],
    end: Annotated[str, typer.Argument(help="Weights after it: a run folder, a .ckpt or a .pt file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist or be empty.")],
    shares: Annotated[str, typer.Option("-s", "--shares", help="Positions between START and END.")] = "0.3,0.5,0.7",
) -> None:
    r"""Write checkpoints between the start and the end of a fine-tuning.

    A larger share adds both learning and forgetting; compare the shares with evaluate.py. A run with
    retention=interpolation does this automatically. Adapters are merged first.

    [bold]Examples[/bold]

      $ medsam2 interpolate nano runs/first --shares 0.3,0.5,0.7 --out between
      $ python evaluate.py 'checkpoint=\[nano,between/share_0.3.pt,runs/first]' data.source=shards output=scores
    """
    from rich.console import Console

    from medsam2.adaptation import interpolate as weights
    from medsam2.errors import UserError
    from medsam2.files import new_folder
    from medsam2.model.build import load_model

    try:
        numbers = [float(word) for word in shares.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"--shares {shares} is not a list of numbers; write for example 0.3,0.5,0.7.") from None
    models = load_model(start), load_model(end)
    # validate all shares before writing the first file
    provenances = {share: weights.interpolated_provenance(*models, share) for share in weights.check_shares(numbers)}
    first, last = (model.sam.state_dict() for model in models)
    folder = new_folder(out)
    for share, provenance in provenances.items():
        path = folder / f"share_{share:g}.pt"
        weights.save_interpolated(path, weights.interpolate(first, last, share), provenance)
        Console().print(f"wrote {path}", highlight=False, soft_wrap=True)
