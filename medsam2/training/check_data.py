"""`mode=check`, the data: a batch of every data set is read, each clip for itself, and its shards are looked for."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from medsam2.data.batch import ClipBatch
from medsam2.data.catalog import Catalog
from medsam2.data.plan import Plan
from medsam2.data.reader import BatchReader
from medsam2.data.sources import Source
from medsam2.data.stream import BLOCK, PlanEntry, Stream
from medsam2.errors import UserError
from medsam2.shards.index import JSON

LOOKED_AT = 1000  # segments of a data set whose shapes are compared
NAMED = 3  # shards that are wrong are named, the others counted


@dataclass(frozen=True)
class DataRow:
    """One data set, as one kind of batch.

    Attributes:
        kind: "clips" or "stills".
        share: of all clips of an epoch.
        cases, segments: eligible ones. read: clips that were read.
        shape: height x width of the segments as stored, from the smallest to the largest; "grey" or "colour".
        frames: how many a segment has, the fewest and the most.
        read_ms: milliseconds to read and decode a clip, median of those read (the first opens files); NaN without any.
        problems: what would end or harm a run. doubts: what may be as it should.
    """

    source: str
    modality: str
    kind: str
    share: float
    cases: int
    segments: int
    read: int
    shape: str
    frames: str
    read_ms: float
    problems: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """The row as text, under `HEADINGS`."""
        wrong = "; ".join((*self.problems, *self.doubts)) or "nothing"
        numbers = (f"{self.share:.1%}", str(self.cases), str(self.segments), str(self.read))
        return (self.source, self.modality, self.kind, *numbers, self.shape, self.frames, f"{self.read_ms:.1f}", wrong)


HEADINGS = (
    *("data set", "modality", "batches of", "share", "cases", "segments", "clips read", "shape", "frames"),
    *("ms a clip", "what is wrong"),
)


def data_table(rows: list[DataRow]) -> Table:
    table = Table(title="A batch of every data set", title_justify="left")
    for heading in HEADINGS:
        text = heading in ("data set", "modality", "batches of", "shape", "what is wrong")
        table.add_column(heading, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.cells())
    return table


def check_data(plan: Plan) -> list[DataRow]:
    """Read as many clips of each data set as a batch of one device holds, without augmentation."""
    own, reader = plan.settings, BatchReader(plan.catalogs, None)
    counts = {"clips": own.clips_per_batch, "stills": own.stills.clips_per_batch}
    places = [(stream, source) for stream in plan.streams.values() for source in stream.sources]
    return [
        _row(plan, reader, stream, source, expected.share, counts[stream.kind])
        for (stream, source), expected in zip(places, plan.expected_shares(1), strict=True)
    ]


def _row(plan: Plan, reader: BatchReader, stream: Stream, source: Source, share: float, count: int) -> DataRow:
    catalog = plan.catalogs[source.folder]
    problems, doubts = shards_missing(catalog, source), []
    damaged: list[str] = []
    took: list[float] = []
    flat = hidden = 0
    for entry in entries_of(stream, source, count) if not problems else ():
        begun = time.perf_counter()
        try:
            batch = reader.read([entry], 0)
        except (UserError, OSError) as error:
            damaged.append(str(error))
            continue
        took.append(time.perf_counter() - begun)
        flat += is_flat(batch)
        hidden += not bool(batch.masks[:, 0].flatten(1).any(1).all())
    read = len(took)
    if damaged:
        problems.append(f"{len(damaged)} of {read + len(damaged)} clips cannot be read: {damaged[0]}")
    if hidden:
        problems.append(f"{hidden} of {read} clips have an object without a mask on the prompted frame; prepare again")
    if flat:
        doubts.append(f"{flat} of {read} clips have one grey value only")
    if not share:
        doubts.append("its share is 0: it is never drawn")
    shape, frames = extent(catalog, source.rows)
    return DataRow(
        source.label, source.modality, stream.kind, share, source.cases, source.segments, read, shape, frames,
        1000 * statistics.median(took) if took else float("nan"), tuple(problems), tuple(doubts),
    )  # fmt: skip


def entries_of(stream: Stream, source: Source, count: int) -> Iterator[PlanEntry]:
    """The first clips of one data set in the order of the run; none where its share is 0."""
    found = 0
    for position in range(BLOCK):
        if found < count and stream.segment(position)[0] is source:
            found += 1
            yield stream.entry(position)


def is_flat(batch: ClipBatch) -> bool:
    """Whether the only clip of a batch has one value everywhere: a window that leaves nothing, or an empty scan."""
    height, width = batch.sizes[0].tolist()
    valid = batch.frames[0, :, :, :height, :width]
    return bool(valid.min() == valid.max())


def extent(catalog: Catalog, rows: np.ndarray) -> tuple[str, str]:
    """('128x128 to 256x200 grey', '3-64'): shapes and lengths of (at most 1,000, evenly chosen) segments."""
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(int))]
    places = [catalog.location(int(row)) for row in chosen]
    sizes = sorted({(place.height, place.width) for place in places})
    colours = sorted({"grey" if place.channels == 1 else "colour" for place in places})
    low, high = sizes[0], sizes[-1]
    shape = f"{low[0]}x{low[1]}" + (f" to {high[0]}x{high[1]}" if low != high else "")
    counts = catalog.frame_counts[rows]
    fewest, most = int(counts.min()), int(counts.max())
    return f"{shape} {' and '.join(colours)}", str(most) if fewest == most else f"{fewest}-{most}"


def shards_missing(catalog: Catalog, source: Source) -> list[str]:
    """Shards of a local folder that are not there, or not as long as `index.json` says; nothing is read."""
    if catalog.store.remote:
        return []  # each is checked when it is fetched or read
    lengths = expected_lengths(catalog.folder)
    wrong = []
    for shard in catalog.distinct("shard", source.rows):
        try:
            found = (catalog.folder / shard).stat().st_size
        except OSError:
            wrong.append(f"{shard} is missing")
            continue
        if found != lengths.get(shard, found):
            wrong.append(f"{shard} has {found:,} bytes, index.json says {lengths[shard]:,}")
    if not wrong:
        return []
    more = f" (and {len(wrong) - NAMED} more)" if len(wrong) > NAMED else ""
    return [f"{'; '.join(wrong[:NAMED])}{more}: copy or prepare {catalog.store.shown} again"]


def expected_lengths(folder: Path) -> dict[str, int]:
    """Bytes of each shard as `index.json` states them; empty where there is none (shards of other tools)."""
    try:
        stated = json.loads((folder / JSON).read_text())["shards"]
        return {name: int(entry["bytes"]) for name, entry in stated.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
