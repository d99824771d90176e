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
    from medsam2.errors import UserError
    from medsam2.model.sizes import NANO, NANO_ASSET, model_table
    from medsam2.reporting.tables import Column, Table, print_table, words

    for path in folder or ():
        if not path.expanduser().is_dir():
            raise UserError(f"--folder {path} is not a folder.")
    places = [place.expanduser() for place in folder] if folder else list(DEFAULT_FOLDERS)
    sizes = model_table()
    rows = []
    for size in sizes:
        candidates = [NANO_ASSET] if size.name == NANO else [place / size.file_name for place in places]
        here = next((str(path) for path in candidates if path.is_file()), "no")
        names = ("checkpoint=nano", "shipped") if size.name == NANO else (size.file_name, here)
        rows.append((size.name, size.version, size.parameters / 1e6, *names))
    columns = (*words("model", "version"), Column("million parameters", numeric=True, digits=1))
    print_table(Table("Model sizes", (*columns, *words("file", "on disk")), tuple(rows)))
    print("Meta publishes the official files at:")
    for size in sizes:
        if size.url:
            print(f"  {size.url}")
    print("Download one and start from it, at 512 or 1024 px:")
    print(
        "  python train.py experiment=quickstart model=hiera_tiny model.image_size=512 "
        "start=checkpoints/sam2.1_hiera_tiny.pt data.shards=SHARDS output=RUN"
    )
