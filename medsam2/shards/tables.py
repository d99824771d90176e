"""The index as flat tables and as one view a case: what inspection counts, draws and checks.

Everything comes from arrow columns in batches, so that 200,000 segments take seconds; no frame is decoded here.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from medsam2.errors import UserError
from medsam2.shards.index import ARROW, SegmentIndex
from medsam2.shards.tar import BLOCK

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

T = TypeVar("T")
Track = Callable[[Any, str], Iterable[Any]]  # passes items on and shows a progress bar meanwhile
BATCH = 4096  # segments: a few tens of MB of object tables at a time
FILLED = 0.9  # of the frame: more is a mask of the whole picture rather than of a structure
TEXTS = ("dataset", "split", "case", "patient", "content_hash", "modality", "kind", "window", "codec", "shard")
CASE = ["dataset", "split", "case"]
STRUCTURE = ["dataset", "split", "modality", "name"]
AXES = {
    "spacing": ("spacing_t", "spacing_y", "spacing_x"),
    "original_shape": ("original_t", "original_h", "original_w"),
}


def no_track(items: Iterable[T], description: str) -> Iterable[T]:
    """The items, without a progress bar."""
    return items


@dataclass(frozen=True)
class ObjectView:
    """One object of a case, over all its segments.

    Attributes:
        frames: on which it is seen. largest: pixels on its largest one.
        border: frames on which it touches a side of the frame. filling: on which it covers more than `FILLED` of it.
        first, last: it is on the first, the last slice of the whole case.
    """

    name: str
    frames: int
    largest: int
    border: int = 0
    filling: int = 0
    first: bool = False
    last: bool = False


@dataclass(frozen=True)
class CaseView:
    """One case as the checks see it.

    Attributes:
        shape: (T, H, W) of the whole case before any reduction. spacing: (t or z, y, x) of that grid.
        segments: how many it was cut into; bare: those of them without any object.
        histogram: counts of its intensities in 32 equal bins of uint8; empty where it was not read.
    """

    dataset: str
    split: str
    case: str
    modality: str
    kind: str
    window: str
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    segments: int
    bare: int
    objects: tuple[ObjectView, ...]
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ShardTables:
    """The index as flat tables.

    Attributes:
        segments: one row a segment. cases: one row a (dataset, split, case), the segments' `case_number`th.
        objects: one row an object of a segment. case_objects: one row an object of a case.
        pixels: int [P], of every object on every frame that shows it: `objects["frames"]` of each row of `objects`.
    """

    segments: pd.DataFrame
    cases: pd.DataFrame
    objects: pd.DataFrame
    case_objects: pd.DataFrame
    pixels: np.ndarray


def read_tables(index: SegmentIndex, track: Track = no_track) -> ShardTables:
    """The tables of a folder of shards.

    Raises:
        UserError: the index lists no segment.
    """
    import pandas as pd

    columns = [*TEXTS, "frames", "height", "width", "spacing", "original_shape", "objects"]
    columns += ["frame_length", "mask_length", "json_length"]
    batches = [b for b in index.table.select(columns).to_batches(max_chunksize=BATCH) if b.num_rows]
    if not batches:
        raise UserError(f"{index.folder / ARROW}: lists no segment; prepare the shards again.")
    segments, objects, pixels, first = [], [], [], 0
    for batch in track(batches, "reading the index"):
        rows = _segment_rows(batch)
        object_rows, object_pixels = _object_rows(batch)
        for name in ("dataset", "split", "modality", "case", "patient"):
            object_rows[name] = rows[name].to_numpy()[object_rows["segment"]]
        object_rows["segment"] += first
        first += len(rows)
        segments.append(rows)
        objects.append(object_rows)
        pixels.append(object_pixels)
    segment_table = pd.concat(segments, ignore_index=True)
    object_table = pd.concat(objects, ignore_index=True)
    numbers = segment_table.groupby(CASE, sort=False).ngroup().to_numpy()
    return ShardTables(
        segment_table.assign(case_number=numbers),
        _case_rows(segment_table, numbers),
        object_table,
        _case_object_rows(object_table, numbers),
        np.concatenate(pixels),
    )


def case_views(tables: ShardTables, histograms: Mapping[int, np.ndarray] | None = None) -> Iterator[CaseView]:
    """One view a case, in the order of the index. histograms: by segment row; summed over those of a case."""
    of_case: dict[int, np.ndarray] = {}
    numbers = tables.segments["case_number"].to_numpy()
    for row, histogram in (histograms or {}).items():
        number = int(numbers[row])
        of_case[number] = of_case.get(number, 0) + np.asarray(histogram, np.int64)
    starts = tables.case_objects["case_number"].searchsorted(np.arange(len(tables.cases) + 1))
    for first in range(0, len(tables.cases), BATCH):  # Python objects of a part of the cases at a time
        stop = min(first + BATCH, len(tables.cases))
        places = (starts[first : stop + 1] - starts[first]).tolist()
        objects = tables.case_objects.iloc[starts[first] : starts[stop]]
        views = [ObjectView(*row) for row in zip(*(objects[f.name].tolist() for f in fields(ObjectView)), strict=True)]
        cases = tables.cases.iloc[first:stop]
        texts, spacing, shape, counts = (
            zip(*(cases[name].tolist() for name in names), strict=True)
            for names in ((*CASE, "modality", "kind", "window"), *AXES.values(), ("segments", "bare"))
        )
        for place, (text, mm, size, count) in enumerate(zip(texts, spacing, shape, counts, strict=True)):
            histogram = of_case.get(first + place, np.empty(0, np.int64))
            yield CaseView(*text, mm, size, *count, tuple(views[places[place] : places[place + 1]]), tuple(histogram))


def _segment_rows(batch: pa.RecordBatch) -> pd.DataFrame:
    """One row a segment: names, sizes, the bytes that its members take in the tar, and its number of objects."""
    import pandas as pd

    table: dict[str, Any] = {name: batch.column(name).to_pandas() for name in TEXTS}
    for name in ("height", "width"):
        table[name] = batch.column(name).to_numpy()
    for name, axes in AXES.items():
        values = batch.column(name).flatten().to_numpy().reshape(-1, 3)
        table |= {axis: values[:, place] for place, axis in enumerate(axes)}
    frames, lengths, starts = _lists(batch.column("frames"))
    table["frames"] = lengths
    table["first_frame"], table["last_frame"] = frames[starts], frames[starts + lengths - 1]
    jsons = batch.column("json_length").to_numpy()
    table["bytes"] = np.where(jsons > 0, _in_tar(jsons), 0)  # samples of other tools have no record
    for name in ("frame_length", "mask_length"):
        sizes, counts, _ = _lists(batch.column(name))
        table["bytes"] = table["bytes"] + _sums(_in_tar(sizes), counts)
    table["objects"] = _lists(batch.column("objects"))[1]
    return pd.DataFrame(table)


def _object_rows(batch: pa.RecordBatch) -> tuple[pd.DataFrame, np.ndarray]:
    """One row an object of a segment, and the pixels of the objects on the frames where they are, one after another."""
    import pandas as pd

    _, counts, _ = _lists(batch.column("objects"))
    found = batch.column("objects").flatten()
    parent = np.repeat(np.arange(batch.num_rows), counts)
    pixels, lengths, starts = _lists(found.field("pixels"))
    boxes = _lists(found.field("boxes"))[0].reshape(-1, 4)
    height, width = (np.repeat(batch.column(name).to_numpy()[parent], lengths) for name in ("height", "width"))
    seen = pixels > 0
    at_border = (boxes[:, 0] == 0) | (boxes[:, 1] == 0) | (boxes[:, 2] >= width) | (boxes[:, 3] >= height)
    largest = np.zeros(len(parent), np.int64)
    some = lengths > 0
    if some.any():
        largest[some] = np.maximum.reduceat(pixels, starts[some])
    frames, frame_counts, frame_starts = _lists(batch.column("frames"))
    depth = batch.column("original_shape").flatten().to_numpy().reshape(-1, 3)[:, 0]
    of_all = frames[frame_starts[parent]] == 0, frames[(frame_starts + frame_counts - 1)[parent]] == depth[parent] - 1
    seen_at_ends = (np.zeros(len(parent), bool), np.zeros(len(parent), bool))
    seen_at_ends[0][some], seen_at_ends[1][some] = seen[starts[some]], seen[(starts + lengths - 1)[some]]
    table = {
        "segment": parent,
        "name": found.field("name").to_pandas(),
        "value": found.field("value").to_numpy(),
        "plane": found.field("plane").to_numpy(),
        "frames": _sums(seen, lengths),
        "largest": largest,
        "border": _sums(seen & at_border, lengths),
        "filling": _sums(pixels > FILLED * height * width, lengths),
        "first": seen_at_ends[0] & of_all[0],
        "last": seen_at_ends[1] & of_all[1],
    }
    return pd.DataFrame(table), pixels[seen]


def _case_rows(segments: pd.DataFrame, numbers: np.ndarray) -> pd.DataFrame:
    """One row a case, in the order of first appearance: what all its segments share, and sums over them."""
    same = [
        name for name in segments.columns if name not in ("frames", "bytes", "objects", "first_frame", "last_frame")
    ]
    bare = segments.assign(segments=1, bare=segments["objects"] == 0)
    groups = bare.groupby(numbers)
    return groups[same].first().join(groups[["segments", "bare", "frames", "bytes"]].sum())


def _case_object_rows(objects: pd.DataFrame, numbers: np.ndarray) -> pd.DataFrame:
    """One row an object of a case, sorted by `case_number`: its segments' rows merged."""
    of_case = objects.assign(case_number=numbers[objects["segment"].to_numpy()])
    merged = of_case.groupby(["case_number", "plane", "value"], sort=True).agg(
        {"name": "first", "frames": "sum", "largest": "max", "border": "sum", "filling": "sum"}
        | {"first": "any", "last": "any"}
    )
    return merged.reset_index()


def _lists(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A list column as (values of all lists, length of each, start of each). Structs have no values here."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    values = np.empty(0) if pa.types.is_struct(column.type.value_type) else column.flatten().to_numpy()
    return values, lengths, starts


def _sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The sum of each of the lists whose values stand one after another; 0 of an empty one."""
    ends = np.cumsum(lengths)
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(total[ends] - total[ends - lengths])


def _in_tar(sizes: np.ndarray) -> np.ndarray:
    """Bytes that members of these sizes take: a header, and the content in whole blocks."""
    return np.asarray((1 + -(-sizes // BLOCK)) * BLOCK)
