"""Tars as other WebDataset tools write them, and the index of them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from medsam2.cases.settings import SettingsBook
from medsam2.shards.foreign import Indexed, IndexOptions, index_tars
from medsam2.shards.index import IndexRow, read_index
from medsam2.shards.load import load_segment

SHARES = {"train": 0.8, "val": 0.2}


def index(source: Path | str, out: Path | str | None = None, **more: Any) -> Indexed:
    given: dict[str, Any] = {"book": SettingsBook(), "shares": SHARES, "modality": "US", **more}
    return index_tars(source, out or source, IndexOptions(**given))


def rows_of(folder: Path) -> dict[str, IndexRow]:
    found = read_index(folder)
    return {row.key: row for row in map(found.row, range(len(found)))}


def load(folder: Path, key: str) -> tuple[IndexRow, np.ndarray, np.ndarray]:
    found = read_index(folder)
    return load_segment(found, next(n for n in range(len(found)) if found.row(n).key == key))


def reasons(result: Indexed) -> dict[str, str]:
    return {entry.key: entry.reason for entry in result.skipped}


def picture(seed: int, size: tuple[int, ...] = (20, 24, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, size, np.uint8)


def labels(seed: int = 0, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[3:9, 4 : 10 + seed % 5] = 1
    mask[12:17, 6:20] = 2
    return mask


def encoded(image: Image.Image | np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def palette(mask: np.ndarray) -> bytes:
    image = Image.fromarray(mask)
    image.putpalette([(n * 37) % 256 for n in range(768)])
    return encoded(image, "PNG")


def write(path: Path, samples: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as sink:
        for sample in samples:
            sink.write(sample)
    return path


def stills(count: int, first: int = 0, **note: Any) -> list[dict[str, Any]]:
    return [
        {
            "__key__": f"{n:06d}",
            "jpg": encoded(picture(n), "JPEG"),
            "mask.png": encoded(labels(n), "PNG"),
            "json": {"labels": {"1": "liver", "tumour": 2}, "patient": f"p{n}", **note},
        }
        for n in range(first, first + count)
    ]


MASK, JPEG = encoded(labels(), "PNG"), encoded(picture(0), "JPEG")
