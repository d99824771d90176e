"""A generated index of many small shards, as `medsam2 prepare` writes it, without the shards.

Datasets differ in size, bytes per frame, objects per segment and duration of objects. A shard is closed at a given
number of bytes, as in `prepare`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from index import coded, hashes, lists

NAMES, SEGMENTS_A_CASE = 40, 4


@dataclass(frozen=True)
class Collection:
    """A dataset: its share of all segments, bytes of a stored frame with its masks, objects per segment."""

    name: str
    modality: str
    share: float
    frame_bytes: int
    objects: int


COLLECTIONS = (
    Collection("ct_large", "CT", 0.40, 150_000, 4),
    Collection("ct_lesions", "CT", 0.15, 140_000, 1),
    Collection("mr_organs", "MR", 0.12, 90_000, 3),
    Collection("mr_brain", "MR", 0.08, 60_000, 2),
    Collection("pet", "PT", 0.02, 30_000, 2),
    Collection("ultrasound", "US", 0.08, 70_000, 1),
    Collection("endoscopy", "ENDOSCOPY", 0.10, 450_000, 2),
    Collection("microscopy", "MICROSCOPY", 0.05, 200_000, 8),
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of each segment and shard in the index. segment_bytes, shard_of: int64 [R]. shard_bytes: int64 [S]."""

    segment_bytes: np.ndarray
    shard_of: np.ndarray
    shard_bytes: np.ndarray


STORED = 4  # frames per segment in the generated index; the plan uses them only for the window of a clip


def write(folder: Path, shards: int, frames: int, shard_bytes: int, seed: int = 0) -> Sizes:
    """Write `index.arrow` of about `shards` shards with segments of `frames` frames; return their sizes.

    Rows have only `STORED` frames, so that the index of 25 TB fits on a laptop; the bytes are those of all frames.
    """
    from medsam2.shards.index import schema, write_table

    rng = np.random.default_rng(seed)
    mean = sum(one.share * one.frame_bytes for one in COLLECTIONS) * frames
    counts = [int(shards * shard_bytes / mean * one.share) for one in COLLECTIONS]
    kind = np.repeat(np.arange(len(COLLECTIONS)), counts)
    segments = len(kind)
    objects = 1 + rng.poisson(np.array([one.objects - 1 for one in COLLECTIONS])[kind])
    frame_bytes = np.array([one.frame_bytes for one in COLLECTIONS])[kind] * rng.lognormal(
        -0.08, 0.4, segments
    )  # mean 1
    lengths = np.stack([frame_bytes * 0.9, frame_bytes * 0.1], axis=1).astype(np.int32) + 64
    sizes = (lengths.sum(axis=1, dtype=np.int64) + 1024) * frames + 1536
    shard_of = _closed(sizes, kind, shard_bytes)
    table = _columns(rng, kind, objects, lengths, shard_of, STORED)
    folder.mkdir(parents=True)
    write_table(folder, pa.Table.from_arrays([table[name] for name in schema().names], schema=schema()))
    return Sizes(sizes, shard_of, np.bincount(shard_of, sizes).astype(np.int64))


def _closed(sizes: np.ndarray, kind: np.ndarray, limit: int) -> np.ndarray:
    """Return the shard of each segment, int64 [R]; a shard is closed near the limit, or at the end of its dataset."""
    shard_of, first = np.empty(len(sizes), np.int64), 0
    for number in range(len(COLLECTIONS)):
        mine = kind == number
        own = np.cumsum(sizes[mine]) // limit
        shard_of[mine] = first + np.unique(own, return_inverse=True)[1]
        first = int(shard_of[mine].max()) + 1
    return shard_of


def _columns(
    rng: np.random.Generator,
    kind: np.ndarray,
    objects: np.ndarray,
    lengths: np.ndarray,
    shard_of: np.ndarray,
    frames: int,
) -> dict[str, Any]:
    import pyarrow.compute as pc

    from medsam2.shards.index import schema

    segments, total = len(kind), int(objects.sum())
    case = np.arange(segments) // SEGMENTS_A_CASE
    case_texts = hashes(rng, int(case[-1]) + 1, 16)
    pixels = rng.integers(50, 5000, (total, frames), dtype=np.int32)
    pixels[rng.random(total) < 0.3, frames // 2 :] = 0
    own: dict[str, pa.Array] = {
        "name": coded(rng.integers(0, NAMES, total), [f"structure_{n:02d}" for n in range(NAMES)]),
        "value": pa.array(np.ones(total, np.int32)), "plane": pa.array(np.zeros(total, np.int32)),
        "peak": pa.array(pixels.max(axis=1)), "pixels": lists(pixels.reshape(-1), frames),
        "boxes": lists(np.tile(np.array([10, 20, 80, 90], np.int32), total * frames), frames * 4),
        "lines": pa.ListArray.from_arrays(pa.array(np.zeros(total + 1, np.int32)), pa.array(np.zeros(0, np.float32))),
    }  # fmt: skip
    kinds = schema().field("objects").type.value_type
    struct = pa.StructArray.from_arrays([own[field.name] for field in kinds], fields=list(kinds))
    same = {"kind": "volume", "mask_dtype": "uint8", "codec": "zstd", "mask_codec": "zstd", "window": "none"}
    sizes = {"height": 512, "width": 512, "channels": 1, "mask_planes": 1, "json_length": 900}
    numbers = pa.array([f"-{n:05d}" for n in range(SEGMENTS_A_CASE)]).take(
        pa.array(np.arange(segments) % SEGMENTS_A_CASE)
    )
    offsets = np.concatenate([[0], np.cumsum(objects)])
    places = np.arange(segments * frames, dtype=np.int64) * 1000
    modalities = sorted({one.modality for one in COLLECTIONS})
    return {
        **{name: coded(np.zeros(segments), [text]) for name, text in same.items()},
        **{name: pa.array(np.full(segments, size, np.int32)) for name, size in sizes.items()},
        "key": pc.binary_join_element_wise(case_texts.take(pa.array(case)), numbers, ""),
        "dataset": coded(kind, [one.name for one in COLLECTIONS]),
        "split": coded(np.zeros(segments), ["train"]),
        "case": coded(case, case_texts), "patient": coded(case, case_texts), "content_hash": coded(case, case_texts),
        "modality": coded(np.array([modalities.index(c.modality) for c in COLLECTIONS])[kind], modalities),
        "frames": lists(np.tile(np.arange(frames, dtype=np.int32), segments), frames),
        "spacing": lists(np.tile([2.0, 0.8, 0.8], segments), 3), "scale": lists(np.ones(segments * 2), 2),
        "original_shape": lists(np.tile(np.array([128, 512, 512], np.int32), segments), 3),
        "objects": pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), struct),
        "shard": coded(shard_of, [f"big-train-{n:06d}.tar" for n in range(int(shard_of[-1]) + 1)]),
        "json_offset": pa.array(np.full(segments, 512, np.int64)),
        **{f"{name}_offset": lists(places, frames) for name in ("frame", "mask")},
        "frame_length": lists(np.repeat(lengths[:, 0], frames), frames),
        "mask_length": lists(np.repeat(lengths[:, 1], frames), frames),
    }  # fmt: skip
