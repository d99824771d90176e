"""`medsam2 clips`: what training will see, as pictures."""

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

QUALITY = 85  # of the JPEG


@explain_errors
def clips(
    shards: Annotated[str, typer.Argument(help="A folder (or URL) made by medsam2 prepare.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures, clips-MODALITY.jpg.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="As for train.py: augment=strong, data.modalities=[CT] ...")
    ] = None,
    count: Annotated[int, typer.Option("--clips", min=1, max=256, help="Clips of each modality.")] = 16,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the run. Default: the configuration's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace pictures that exist.")] = False,
) -> None:
    """Draw augmented training clips of each modality, composed and drawn as train.py does.

    Of each clip the first, middle and last frame, at the resolution of the model's input, with its objects' outlines.

    [bold]Examples[/bold]

      $ medsam2 clips shards/ --out pictures
      $ medsam2 clips shards/ --out pictures augment=strong 'data.modalities=[CT]' model=hiera_tiny model.image_size=512
    """
    from medsam2.data.augment.augment import Augment
    from medsam2.data.plan.plan import Plan
    from medsam2.data.read.catalog import Catalog
    from medsam2.data.read.store import open_store

    data, augment_settings, size, own_seed = _compose(shards, overrides or ())
    catalogs = [Catalog(open_store(location)) for location in data.shards]
    plan = Plan(catalogs, data, own_seed if seed is None else seed, global_batch=1)
    modalities = sorted({source.modality for source in plan.sources})
    paths = {modality: out / f"clips-{modality}.jpg" for modality in modalities}
    taken = [str(path) for path in paths.values() if path.exists()]
    if taken and not force:
        raise UserError(f"{', '.join(taken)} already there; choose another --out, or add --force to replace.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); choose another folder.") from None
    augment = Augment(augment_settings, size)
    for modality, path in paths.items():
        _draw(path, plan, augment, modality, count)
        print(path)


def _compose(shards: str, overrides: Sequence[str]) -> tuple[DataSettings, AugmentSettings, int, int]:
    """The `data` and `augment` groups, the side of the model's input and the seed of a training run."""
    from medsam2.config import compose, validate
    from medsam2.data.settings import AugmentSettings, DataSettings

    # a path may hold what Hydra's grammar gives a meaning to, so it is put in afterwards
    config = compose("train", [*overrides, "data.shards=unused", "output=unused"])
    data = validate(DataSettings, {**config["data"], "shards": shards}, "data")
    return data, validate(AugmentSettings, config["augment"], "augment"), config["model"]["image_size"], config["seed"]


def _draw(path: Path, plan: Plan, augment: Augment, modality: str, count: int) -> None:
    """One sheet, whole or not at all."""
    from medsam2.cli.console import track
    from medsam2.data.pictures import modality_clips, sheet
    from medsam2.files import atomic_write
    from medsam2.reporting.overlays import encode

    clips = list(track(islice(modality_clips(plan, augment, modality), count), modality, total=count))
    size = augment.image_size
    title = (
        f"{modality}: {count} training clips, first, middle and last frame, {size} x {size} pixels, seed {plan.seed}"
    )
    with atomic_write(path) as file:
        file.write(encode(sheet(clips, title), "JPEG", QUALITY))
