"""Small folders of shards, as `medsam2 prepare` writes them, made without any raw data."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsam2.shards.index import write_index
from medsam2.shards.prepare.pseudonyms import read_salt, salted_hash
from medsam2.shards.prepare.stage import write_segment
from medsam2.shards.record import ObjectTable, SegmentRecord
from medsam2.shards.summary import summarise
from medsam2.shards.tar import END_MARK, new_tar


@dataclass(frozen=True)
class Scan:
    """One case of two segments of three frames."""

    patient: str
    shard: str
    dataset: str = "d"
    number: int = 0
    content: str = ""


SCANS = (
    Scan("smith", "d-train-000000.tar"),
    Scan("jones", "d-train-000000.tar"),
    Scan("smith", "d-train-000001.tar", number=1),
    Scan("meier", "d-train-000001.tar", content="same voxels"),
    Scan("lopez", "d-train-000002.tar"),
    Scan("weber", "d-val-000000.tar", content="same voxels"),
    Scan("smith", "e-train-000000.tar", dataset="e"),
    Scan("novak", "e-train-000001.tar", dataset="e"),
)


def patient_id(name: str, dataset: str = "d") -> str:
    return salted_hash(read_salt(), "patient", dataset, name)


def case_id(scan: Scan) -> str:
    return salted_hash(read_salt(), "case", scan.dataset, f"{scan.patient}{scan.number}")


def segment(scan: Scan, first: int) -> tuple[SegmentRecord, np.ndarray, np.ndarray]:
    name = f"{scan.dataset}/{scan.patient}/{scan.number}"
    rng = np.random.default_rng([first, *name.encode()])
    frames = rng.integers(0, 255, (3, 16, 24), np.uint8)
    planes = rng.integers(0, 2, (1, 3, 16, 24), np.uint8)
    pixels = tuple(int(plane.sum()) for plane in planes[0])
    record = SegmentRecord(
        key=f"{scan.dataset}-{case_id(scan)}-{first:05d}", dataset=scan.dataset, split=scan.shard.split("-")[1],
        case=case_id(scan), patient=patient_id(scan.patient, scan.dataset),
        content_hash=hashlib.sha256((scan.content or name).encode()).hexdigest(), modality="MR", kind="volume",
        frames=tuple(range(first, first + 3)), shape=(3, 16, 24), channels=1, mask_planes=1, mask_dtype="uint8",
        original_shape=(6, 16, 24), spacing=(2.0, 1.0, 1.0), affine=None, scale=(1.0, 1.0), window="percentiles",
        codec="zstd", mask_codec="zstd",
        objects=(ObjectTable(name="organ", value=1, plane=0, pixels=pixels, boxes=((0, 0, 24, 16),) * 3),),
    )  # fmt: skip
    return record, frames, planes


def build(folder: Path, scans: Sequence[Scan] = SCANS, **more: Any) -> Path:
    """Shards as `medsam2 prepare` writes them, without reading any raw data."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    shards: dict[str, dict[str, Any]] = {}
    for shard in dict.fromkeys(scan.shard for scan in scans):
        file = io.BytesIO()
        tar = new_tar(file)
        for scan in scans:
            for first in (0, 3) if scan.shard == shard else ():
                rows.append({**write_segment(tar, *segment(scan, first)), "shard": shard})
        content = file.getvalue() + END_MARK
        (folder / shard).write_bytes(content)
        shards[shard] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    said = {"d": {"source": "a clinic", "licence": "CC0", "layout": "nnunet"}}
    write_index(folder, rows, {**summarise(rows, shards, {"seed": 0}, 1, said), **more})
    return folder
