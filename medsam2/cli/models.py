"""`medsam2 models`: list model sizes, the sources of their weights, and the files on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_FOLDERS = (Path("."), Path("checkpoints"))


def models(
    folder: Annotated[
        list[Path] | None, typer.Option("--folder", "-f", help="Folder with checkpoints; repeatable.")
    ] = None,
) -> None:
    """List the model sizes with parameters, official file name, Meta's download address and location on disk.

    Without --folder, the working folder and checkpoints/ are searched.

    [bold]Examples[/bold]

      $ medsam2 models
      $ medsam2 models --folder /data/sam2 --folder ~/Downloads
    """
    from medsam2.errors import UserError
    from medsam2.model.sizes import NANO, PUBLISHED, SIZES
    from medsam2.reporting.tables import Column, Table, print_table, words

    for path in folder or ():
        if not path.expanduser().is_dir():
            raise UserError(f"--folder {path} is not a folder.")
    folders = [path.expanduser() for path in folder] if folder else list(DEFAULT_FOLDERS)
    nano = SIZES[NANO].parameters["2.1"]
    rows = [(NANO, "2.1", nano / 1e6, "checkpoint=nano", "shipped")]
    for size, version in PUBLISHED:
        file = size.file_name(version)
        location = next((str(path / file) for path in folders if (path / file).is_file()), "no")
        rows.append((size.name, version, size.parameters[version] / 1e6, file, location))
    columns = (*words("model", "version"), Column("million parameters", numeric=True, digits=1))
    print_table(Table("Model sizes", (*columns, *words("file", "on disk")), tuple(rows)))
    print("Meta publishes the official files at:")
    for size, version in PUBLISHED:
        print(f"  {size.url(version)}")
    print("Download one and start from it, at 512 or 1024 px:")
    print(
        "  python train.py experiment=quickstart model=hiera_tiny model.image_size=512 "
        "start=checkpoints/sam2.1_hiera_tiny.pt data.shards=SHARDS output=RUN"
    )
