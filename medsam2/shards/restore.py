"""Masks on the stored grid of shards, back on the grid of the file that the case came from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medsam2.cases.case import Orientation
from medsam2.cases.geometry import enlarge, to_source
from medsam2.errors import UserError
from medsam2.shards.index import SegmentIndex
from medsam2.shards.load import load_record


def source_mask(
    index: SegmentIndex, rows: Sequence[int], masks: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The mask of a whole case as [Z, Y, X] of its source, with the source's RAS+ affine (None where it has none).

    Args:
        rows: the segments of one case. masks: one [t, h, w] for each, on the stored grid; frames in no segment are 0.

    Raises:
        UserError: rows of several cases.
    """
    records = [load_record(index, row) for row in rows]
    if len({record.case for record in records}) != 1:
        raise UserError(f"{index.folder}: the rows {list(rows)} belong to several cases.")
    first = records[0]
    whole = np.zeros(first.original_shape, masks[0].dtype)
    for record, mask in zip(records, masks, strict=True):
        whole[list(record.frames)] = enlarge(mask, *first.original_shape[1:])
    affine = None if first.affine is None else np.array(first.affine)
    return to_source(whole, Orientation(first.axes, first.flips), affine)
