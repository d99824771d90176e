"""The same CT-like clips as shards of ours, and as the folders that Meta's training package reads.

Legend: T frames, H and W pixels (both `SIDE`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

SIDE = 512


def scan(seed: int, frames: int, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Make an image uint8 [T, H, W] that compresses like real CT (8 frames: 0.68 MB in zstd-3), and labels [T, H, W].

    The image is smooth tissue with noise, surrounded by air. The objects are ellipses whose size changes over time: one
    of 4 % of the image, or several of 1 % each. Long scans repeat the noise of their first 16 frames.
    """
    from scipy.ndimage import gaussian_filter, zoom

    rng = np.random.default_rng(seed)
    tissue = zoom(gaussian_filter(rng.normal(0, 1, (33, 33)), 1.0), SIDE / 33, order=1)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    image = 110 + 80 * tissue + rng.normal(0, 6, (min(frames, 16), SIDE, SIDE))
    image[:, (y / 0.62) ** 2 + (x / 0.82) ** 2 > 1] = 0
    image = image.clip(0, 255).astype(np.uint8)[np.arange(frames) % 16]
    labels = np.zeros((frames, SIDE, SIDE), np.uint8)
    size = 0.22 if objects == 1 else 0.11
    for number in range(objects):
        angle = 2 * np.pi * (number / objects + 0.05 * seed)
        distance = ((y - 0.32 * np.sin(angle)) / 0.9) ** 2 + (x - 0.45 * np.cos(angle)) ** 2
        for frame in range(frames):
            labels[frame][distance < (size * (1 + 0.1 * np.sin(frame / 3))) ** 2] = number + 1
    return image, labels


def write_shard(folder: Path, seeds: range, frames: int, objects: int, number: int = 0) -> list[dict[str, object]]:
    """Write a tar with one segment per seed, with the writers of `medsam2 prepare`; return its index rows."""
    from medsam2.shards.prepare.stage import write_segment
    from medsam2.shards.record import ObjectTable, SegmentRecord
    from medsam2.shards.tar import new_tar

    folder.mkdir(parents=True, exist_ok=True)
    name, rows = f"ct-train-{number:06d}.tar", []
    with open(folder / name, "wb") as file:
        tar = new_tar(file)
        for seed in seeds:
            image, labels = scan(seed, frames, objects)
            tables = tuple(
                ObjectTable(
                    name=f"structure_{value}",
                    value=value,
                    plane=0,
                    pixels=tuple(int(count) for count in (labels == value).sum((1, 2))),
                    boxes=tuple(_box(frame == value) for frame in labels),
                )
                for value in range(1, objects + 1)
            )
            record = SegmentRecord(
                key=f"ct-{seed:06d}-00000", dataset="ct", split="train", case=f"c{seed}", patient=f"p{seed}",
                content_hash=f"{seed:064x}", modality="CT", kind="volume", frames=tuple(range(frames)),
                shape=(frames, SIDE, SIDE), channels=1, mask_planes=1, mask_dtype="uint8",
                original_shape=(frames, SIDE, SIDE), spacing=(2.5, 0.8, 0.8), affine=None, scale=(1.0, 1.0),
                window="generated", codec="zstd", mask_codec="zstd", objects=tables,
            )  # fmt: skip
            rows.append({**write_segment(tar, record, image, labels[None]), "shard": name})
        file.write(bytes(1024))
    return rows


def write_shards(folder: Path, segments: int, frames: int, objects: int, shards: int = 1) -> Path:
    """Write `shards` tars of `segments` segments each, and their index."""
    from medsam2.shards.index import write_index

    rows: list[dict[str, object]] = []
    for number in range(shards):
        rows += write_shard(folder, range(number * segments, (number + 1) * segments), frames, objects, number)
    write_index(folder, rows, {})
    return folder


def write_pictures(folder: Path, segments: int, frames: int, objects: int) -> Path:
    """Write the same scans in the layout of MOSE and DAVIS: per frame a JPEG, and a palette PNG with its labels."""
    from PIL import Image

    palette = [0, 0, 0, *(channel for value in range(1, 256) for channel in (value, 255 - value, value * 7 % 256))]
    for seed in range(segments):
        image, labels = scan(seed, frames, objects)
        images, annotations = (folder / kind / f"c{seed:03d}" for kind in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for frame in range(frames):
            Image.fromarray(image[frame]).convert("RGB").save(images / f"{frame:05d}.jpg", quality=95)
            picture = Image.fromarray(labels[frame]).convert("P")
            picture.putpalette(palette)
            picture.putdata(labels[frame].reshape(-1).tolist())
            picture.save(annotations / f"{frame:05d}.png")
    return folder


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else (0, 0, 0, 0)
