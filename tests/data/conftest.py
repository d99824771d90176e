"""Generated shards: small tars with an `index.arrow` as `medsam2 prepare` writes it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_shards import HttpShards
from small_shards import build

from medsam2.shards.index import write_index
from medsam2.shards.record import encode_frame, encode_mask


@dataclass
class Sample:
    """One generated segment: image uint8 [T, H, W(, 3)], planes uint8 [P, T, H, W], names of (plane, value)."""

    image: np.ndarray
    planes: np.ndarray
    names: dict[tuple[int, int], str]
    dataset: str = "demo"
    case: str = "c0"
    split: str = "train"
    modality: str = "CT"


def disks(seed: int, frames: int = 12, size: tuple[int, int] = (72, 64), colour: bool = False, **kwargs: str) -> Sample:
    """A large disk on every frame and a small one that is there only on some; the image shows the large mask."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    planes = np.zeros((1, frames, *size), np.uint8)
    start = int(rng.integers(0, max(1, frames // 2)))
    for frame in range(frames):
        y, x = size[0] * 0.45 + 4 * np.sin(frame / 3), size[1] * 0.4
        planes[0, frame][(rows - y) ** 2 + (columns - x) ** 2 < 14**2] = 1
        if start <= frame < start + max(1, frames // 3):
            planes[0, frame][(rows - 14) ** 2 + (columns - size[1] + 14) ** 2 < 5**2] = 2
    image = np.where(planes[0] == 1, 200, 40).astype(np.uint8)
    if colour:
        image = np.stack([image, image // 2, image // 4], axis=-1)
    return Sample(image, planes, {(0, 1): "organ", (0, 2): "lesion"}, case=f"c{seed}", **kwargs)


def _row(sample: Sample, number: int, shard: str, members: dict[str, list[int]], start: int) -> dict[str, Any]:
    objects = []
    for (plane, value), name in sample.names.items():
        masks = sample.planes[plane] == value
        boxes: list[int] = []
        for mask in masks:
            ys, xs = np.nonzero(mask)
            boxes += [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] if len(ys) else [0] * 4
        pixels = [int(mask.sum()) for mask in masks]
        objects.append({"name": name, "value": value, "plane": plane, "pixels": pixels, "boxes": boxes})
    frames, height, width = sample.image.shape[:3]
    return {
        "key": f"{sample.dataset}-{sample.case}-{number:05d}",
        "dataset": sample.dataset,
        "split": sample.split,
        "case": sample.case,
        "patient": f"p-{sample.case}",
        "content_hash": f"hash-{sample.dataset}-{sample.case}",
        "modality": sample.modality,
        "kind": "volume",
        "frames": list(range(frames)),
        "height": height,
        "width": width,
        "channels": 3 if sample.image.ndim == 4 else 1,
        "mask_planes": len(sample.planes),
        "mask_dtype": "uint8",
        "spacing": [1.0, 1.0, 1.0],
        "scale": [1.0, 1.0],
        "codec": "zstd",
        "mask_codec": "zstd",
        "window": "none",
        "original_shape": [frames, height, width],
        "objects": objects,
        "shard": shard,
        "json_offset": start,
        "json_length": 2,
        **members,
    }


def write_shards(folder: Path, samples: Sequence[Sample]) -> Path:
    """All samples in one tar, and the index beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    shard, rows = "demo-train-000000.tar", []
    with tarfile.open(folder / shard, "w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, data: bytes) -> tuple[int, int]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, len(data)

        for number, sample in enumerate(samples):
            key = f"{sample.dataset}-{sample.case}-{number:05d}"
            start, _ = add(f"{key}.json", b"{}")
            members: dict[str, list[int]] = {
                n: [] for n in ("frame_offset", "frame_length", "mask_offset", "mask_length")
            }
            for frame, image in enumerate(sample.image):
                payloads = (
                    ("frame", f"{key}.{frame:04d}.zst", encode_frame(image, "zstd")),
                    ("mask", f"{key}.{frame:04d}.mask.zst", encode_mask(sample.planes[:, frame], "zstd")),
                )
                for kind, name, data in payloads:
                    offset, length = add(name, data)
                    members[f"{kind}_offset"].append(offset)
                    members[f"{kind}_length"].append(length)
            rows.append(_row(sample, number, shard, members, start))
    write_index(folder, rows, {})
    return folder


Writer = Callable[[Path, Sequence[Sample]], Path]


@pytest.fixture(name="write_shards", scope="session")
def write_shards_fixture() -> Writer:
    return write_shards


@pytest.fixture(name="disks", scope="session")
def disks_fixture() -> Callable[..., Sample]:
    return disks


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of 9 and 5 training segments (CT grey, US colour) and three for validation."""
    samples = [disks(seed, dataset="ct", modality="CT") for seed in range(9)]
    samples += [disks(seed, 5, (60, 80), True, dataset="us", modality="US") for seed in range(20, 25)]
    samples += [disks(seed, 20, dataset="ct", split="val") for seed in range(40, 43)]
    return write_shards(tmp_path_factory.mktemp("shards") / "demo", samples)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A small folder of shards, for tests that serve or change it."""
    return build(tmp_path / "local")


@pytest.fixture
def server(local: Path) -> Iterator[HttpShards]:
    """`local` over HTTP."""
    with HttpShards(local) as server:
        yield server
