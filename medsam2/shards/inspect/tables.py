"""The index as flat tables and as one view per case, which inspection counts, draws and checks.

Arrow columns are read in batches, so that 200,000 segments take seconds; no frame is decoded.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from medsam2.errors import UserError
from medsam2.shards.index import INDEX_FILE, SegmentIndex

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

T = TypeVar("T")
Track = Callable[[Any, str], Iterable[Any]]  # yields the items and shows a progress bar
SEGMENTS_PER_BATCH = 4096  # a few tens of MB of object tables
FILLED_SHARE = 0.9  # of the frame; a larger mask probably covers the whole image rather than a structure
TEXT_COLUMNS = ("dataset", "split", "case", "patient", "content_hash", "modality", "kind", "window", "codec", "shard")
CASE_COLUMNS = ["dataset", "split", "case"]
AXIS_COLUMNS = {
    "spacing": ("spacing_t", "spacing_y", "spacing_x"),
    "original_shape": ("original_t", "original_h", "original_w"),
}


def no_track(items: Iterable[T], description: str) -> Iterable[T]:
    """Return the items; shows no progress bar."""
    return items


@dataclass(frozen=True)
class ObjectView:
    """One object of a case, over all its segments.

    Attributes:
        frames: number of frames that show it. largest: pixels on the frame where it is largest.
        fills: it covers more than `FILLED_SHARE` of every frame that shows it.
    """

    name: str
    frames: int
    largest: int
    fills: bool = False


@dataclass(frozen=True)
class CaseView:
    """One case, for the checks.

    Attributes:
        segments: number of its segments. empty_segments: number of those without an object.
        shape: (T, H, W) of the whole case before any reduction. spacing: (t or z, y, x) of that grid.
        histogram: counts of its intensities in 32 equal bins of uint8; empty if not read.
    """

    dataset: str
    split: str
    case: str
    modality: str
    kind: str
    window: str
    segments: int
    empty_segments: int
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    objects: tuple[ObjectView, ...]
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ShardTables:
    """The index as flat tables.

    Attributes:
        segments: one row per segment; `case_number` is the row of its case.
        cases: one row per (dataset, split, case).
        objects: one row per object of a segment. case_objects: one row per object of a case.
    """

    segments: pd.DataFrame
    cases: pd.DataFrame
    objects: pd.DataFrame
    case_objects: pd.DataFrame


def read_tables(index: SegmentIndex, track: Track = no_track) -> ShardTables:
    """Read the tables of a folder of shards.

    Raises:
        UserError: the index lists no segment.
    """
    import pandas as pd

    columns = [*TEXT_COLUMNS, "frames", "height", "width", "spacing", "original_shape", "objects"]
    batches = [b for b in index.table.select(columns).to_batches(max_chunksize=SEGMENTS_PER_BATCH) if b.num_rows]
    if not batches:
        raise UserError(f"{index.folder / INDEX_FILE}: lists no segment; prepare the shards again.")
    segments, objects, first = [], [], 0
    for batch in track(batches, "reading the index"):
        rows = _segment_rows(batch)
        object_rows = _object_rows(batch)
        for name in ("dataset", "split", "modality", "case", "patient"):
            object_rows[name] = rows[name].to_numpy()[object_rows["segment"]]
        object_rows["segment"] += first
        first += len(rows)
        segments.append(rows)
        objects.append(object_rows)
    segment_table = pd.concat(segments, ignore_index=True)
    object_table = pd.concat(objects, ignore_index=True)
    numbers = segment_table.groupby(CASE_COLUMNS, sort=False).ngroup().to_numpy()
    return ShardTables(
        segment_table.assign(case_number=numbers),
        _case_rows(segment_table, numbers),
        object_table,
        _case_object_rows(object_table, numbers),
    )


def case_views(tables: ShardTables, histograms: Mapping[int, np.ndarray] | None = None) -> Iterator[CaseView]:
    """Yield one view per case, in the order of the index. histograms: by segment row; a case has the sum of its own."""
    sums: dict[int, np.ndarray] = {}
    numbers = tables.segments["case_number"].to_numpy()
    for row, histogram in (histograms or {}).items():
        number = int(numbers[row])
        sums[number] = sums.get(number, 0) + np.asarray(histogram, np.int64)
    rows = tables.case_objects[["case_number", *(f.name for f in fields(ObjectView))]].itertuples(False, None)
    objects = {n: tuple(ObjectView(*row[1:]) for row in group) for n, group in groupby(rows, itemgetter(0))}
    names = [*CASE_COLUMNS, "modality", "kind", "window", "segments", "empty_segments"]
    names += [*AXIS_COLUMNS["spacing"], *AXIS_COLUMNS["original_shape"]]
    for number, row in enumerate(tables.cases[names].itertuples(False, None)):
        bins = tuple(sums.get(number, ()))
        # mypy does not know that the slice has eight fields.
        yield CaseView(*row[:8], row[8:11], row[11:], objects.get(number, ()), bins)  # type: ignore[call-arg]


def spread(groups: Sequence[Hashable], count: int) -> list[int]:
    """Choose up to `count` indices of `groups`, evenly over the groups as far as their sizes allow, and within each."""
    places: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    result: list[int] = []
    # The smallest group comes first: the larger ones share what it cannot use.
    for number, members in enumerate(sorted(places.values(), key=len)):
        share = min(len(members), -(-(count - len(result)) // (len(places) - number)))
        result += [members[int((i + 0.5) * len(members) / share)] for i in range(share)]
    return sorted(result)


def _segment_rows(batch: pa.RecordBatch) -> pd.DataFrame:
    """One row per segment: names, sizes, and numbers of frames and objects."""
    import pandas as pd

    table: dict[str, Any] = {name: batch.column(name).to_pandas() for name in (*TEXT_COLUMNS, "height", "width")}
    for name, axes in AXIS_COLUMNS.items():
        values = batch.column(name).flatten().to_numpy().reshape(-1, 3)
        table |= {axis: values[:, place] for place, axis in enumerate(axes)}
    table |= {name: _lengths(batch.column(name)) for name in ("frames", "objects")}
    return pd.DataFrame(table)


def _object_rows(batch: pa.RecordBatch) -> pd.DataFrame:
    """One row per object of a segment: number of frames that show it, median and maximum of its pixels on these."""
    import pandas as pd

    objects = batch.column("objects").flatten()
    segment = np.repeat(np.arange(batch.num_rows), _lengths(batch.column("objects")))
    pixels = objects.field("pixels")
    owner = np.repeat(np.arange(len(segment)), _lengths(pixels))
    areas = pd.DataFrame({"object": owner, "pixels": pixels.flatten().to_numpy()})
    areas = areas[areas["pixels"] > 0].groupby("object")["pixels"]
    rows = areas.agg(frames="size", median="median", smallest="min", largest="max")
    rows = rows.reindex(range(len(segment)), fill_value=0)
    size = (batch.column("height").to_numpy() * batch.column("width").to_numpy())[segment]
    fills = (rows["frames"] == 0) | (rows.pop("smallest") > FILLED_SHARE * size)
    names = {name: objects.field(name).to_pandas() for name in ("name", "value", "plane")}
    return rows.assign(fills=fills, segment=segment, **names)


def _case_rows(segments: pd.DataFrame, numbers: np.ndarray) -> pd.DataFrame:
    """One row per case, in the order of first appearance: the columns that its segments share, and sums over them."""
    shared = [name for name in segments.columns if name not in ("frames", "objects")]
    groups = segments.assign(segments=1, empty_segments=segments["objects"] == 0).groupby(numbers)
    return groups[shared].first().join(groups[["segments", "empty_segments", "frames"]].sum())


def _case_object_rows(objects: pd.DataFrame, numbers: np.ndarray) -> pd.DataFrame:
    """One row per object of a case, sorted by `case_number`: the rows of its segments merged."""
    numbered = objects.assign(case_number=numbers[objects["segment"].to_numpy()])
    merged = numbered.groupby(["case_number", "plane", "value"], sort=True)
    return merged.agg({"name": "first", "frames": "sum", "largest": "max", "fills": "all"}).reset_index()


def _lengths(column: pa.ListArray) -> np.ndarray:
    """The length of each list of a column."""
    import pyarrow.compute as pc

    return np.asarray(pc.list_value_length(column).to_numpy())
