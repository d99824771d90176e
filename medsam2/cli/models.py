"""`medsam2 models`: the sizes, where their weights come from, and which of them are here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_FOLDERS = (Path("."), Path("checkpoints"))


def models(
    folder: Annotated[
        list[Path] | None, typer.Option("--folder", "-f", help="Where to look for checkpoints (may be repeated).")
    ] = None,
) -> None:
    """List the model sizes: parameters, the official file name, where Meta publishes it, and whether it is on disk.

    Looks in the working folder and in checkpoints/ unless folders are given.

    [bold]Examples[/bold]

      $ medsam2 models
      $ medsam2 models --folder /data/sam2 --folder ~/Downloads
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from medsam2.errors import UserError
    from medsam2.model.sizes import NANO, NANO_ASSET, model_table

    for given in folder or ():
        if not given.expanduser().is_dir():
            raise UserError(f"--folder {given} is not a folder.")
    places = [place.expanduser() for place in folder] if folder else list(DEFAULT_FOLDERS)
    rows = model_table()
    table = Table("model", "version", "parameters", "file", "on disk", title="Model sizes", box=box.SIMPLE_HEAD)
    for row in rows:
        found = [NANO_ASSET] if row.name == NANO else [place / row.file_name for place in places]
        here = next((path for path in found if path.is_file()), None)
        disk = "no" if here is None else "[green]shipped[/green]" if row.name == NANO else f"[green]{here}[/green]"
        file_name = "checkpoint=nano" if row.name == NANO else row.file_name
        table.add_row(row.name, row.version, f"{row.parameters / 1e6:.1f} M", file_name, disk)
    Console().print(table)
    print("Meta publishes the official files at:")
    for row in rows:
        if row.url:
            print(f"  {row.url}")
    print("Download one and start from it, at 512 or 1024 px:")
    print(
        "  python train.py experiment=quickstart model=hiera_tiny_512 start=checkpoints/sam2.1_hiera_tiny.pt "
        "data.shards=SHARDS output=RUN"
    )
