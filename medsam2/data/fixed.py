"""The fixed clips of validation: the same frames, objects and prompts whenever and wherever they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medsam2.data.catalog import Catalog
from medsam2.data.counter import seed63
from medsam2.data.entry import PlanEntry
from medsam2.data.settings import DataSettings
from medsam2.data.sources import find_sources, usable_sizes
from medsam2.data.window import largest_window
from medsam2.prompts.randomness import RandomStream


def validation_entries(catalogs: Sequence[Catalog], settings: DataSettings, limit: int) -> tuple[PlanEntry, ...]:
    """The fixed clips of `val_split` in index order: one an object, from its largest frame on.

    More than `limit` are thinned evenly. Seeds depend on the place alone, so that prompts stay the same.
    """
    if not limit or not any(settings.val_split in catalog.codes("split")[0] for catalog in catalogs):
        return ()
    pairs = [
        (source.folder, int(row), int(place))
        for source in find_sources(catalogs, settings.model_copy(update={"repeat_threshold": 0}), settings.val_split)
        for row in source.rows
        for place in _usable_objects(catalogs[source.folder], int(row), source.name_weights, settings)
    ]
    if len(pairs) > limit:
        pairs = [pairs[int(i)] for i in np.linspace(0, len(pairs) - 1, limit).round()]
    entries = []
    for position, (folder, row, place) in enumerate(pairs):
        window = largest_window(catalogs[folder].objects(row).pixels[place], settings.clip_frames)
        frames = tuple(int(frame) for frame in window)
        entries.append(
            PlanEntry(folder, row, frames, (place,), seed63(RandomStream.VALIDATION_CLIP, position), position)
        )
    return tuple(entries)


def _usable_objects(catalog: Catalog, row: int, weights: np.ndarray, settings: DataSettings) -> np.ndarray:
    table = catalog.objects(row)
    return np.flatnonzero((weights[table.names] > 0) & usable_sizes(table.pixels.max(axis=1), settings))
