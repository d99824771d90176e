"""`medsam2 clips`: draw pictures of augmented training clips."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsam2.errors import UserError, explain_errors

if TYPE_CHECKING:
    from medsam2.data.augment.augment import Augment
    from medsam2.data.plan.plan import Plan
    from medsam2.data.settings import AugmentSettings, DataSettings

JPEG_QUALITY = 85


@explain_errors
def clips(
    shards: Annotated[str, typer.Argument(help="A folder (or URL) made by medsam2 prepare.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures, clips-MODALITY.jpg.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides as for train.py: augment=strong, data.modalities=[CT] ...")
    ] = None,
    count: Annotated[int, typer.Option("--clips", min=1, max=256, help="Number of clips per modality.")] = 16,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the run. Default: the configuration's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing pictures.")] = False,
) -> None:
    """Draw augmented training clips of each modality, sampled as in train.py.

    Each clip shows its first, middle and last frame at the resolution of the model's input, with outlines of objects.

    [bold]Examples[/bold]

      $ medsam2 clips shards/ --out pictures
      $ medsam2 clips shards/ --out pictures augment=strong 'data.modalities=[CT]' model=hiera_tiny model.image_size=512
    """
    from medsam2.data.augment.augment import Augment
    from medsam2.data.plan.plan import Plan
    from medsam2.data.read.catalog import Catalog
    from medsam2.data.read.store import open_store

    data, augment_settings, size, config_seed = _compose(shards, overrides or ())
    catalogs = [Catalog(open_store(location)) for location in data.shards]
    plan = Plan(catalogs, data, config_seed if seed is None else seed, global_batch=1)
    modalities = sorted({source.modality for source in plan.sources})
    paths = {modality: out / f"clips-{modality}.jpg" for modality in modalities}
    existing = [str(path) for path in paths.values() if path.exists()]
    if existing and not force:
        raise UserError(f"{', '.join(existing)} already exist; choose another --out, or add --force to replace.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be created ({error.strerror}); choose another folder.") from None
    augment = Augment(augment_settings, size)
    for modality, path in paths.items():
        _draw(path, plan, augment, modality, count)
        print(path)


def _compose(shards: str, overrides: Sequence[str]) -> tuple[DataSettings, AugmentSettings, int, int]:
    """Return the `data` and `augment` groups, the side of the model's input and the seed of a training run."""
    from medsam2.config import compose, validate
    from medsam2.data.settings import AugmentSettings, DataSettings

    # set the path after composing, because it may contain characters of Hydra's grammar
    config = compose("train", [*overrides, "data.shards=unused", "output=unused"])
    data = validate(DataSettings, {**config["data"], "shards": shards}, "data")
    return data, validate(AugmentSettings, config["augment"], "augment"), config["model"]["image_size"], config["seed"]


def _draw(path: Path, plan: Plan, augment: Augment, modality: str, count: int) -> None:
    """Write one sheet of pictures atomically."""
    from medsam2.cli.console import track
    from medsam2.data.pictures import modality_clips, sheet
    from medsam2.files import atomic_write
    from medsam2.reporting.overlays import encode

    clips = list(track(islice(modality_clips(plan, augment, modality), count), modality, total=count))
    size = augment.image_size
    title = f"{modality}: {count} training clips (first, middle, last frame), {size} x {size} px, seed {plan.seed}"
    with atomic_write(path) as file:
        file.write(encode(sheet(clips, title), "JPEG", JPEG_QUALITY))
