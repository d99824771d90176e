"""Time and memory of `medsam2 prepare`; peer: reading the same files with SimpleITK, in the same run.

    python benchmarks/prepare.py            # 40 CT volumes of 512 x 512 x 120
    python benchmarks/prepare.py --quick    # 6 of 256 x 256 x 60, under a minute

Both use the same number of processes. Ends with one line of JSON: `ratio_time` is prepare over reading, and
`ratio_memory` the peak of prepare's largest process over that of the largest reader.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np


def write_volumes(folder: Path, count: int, shape: tuple[int, int, int]) -> None:
    """Write an nnU-Net dataset of CT-like volumes: smooth tissue with noise, air around it, two organs in each mask."""
    import SimpleITK as sitk
    from scipy.ndimage import gaussian_filter, zoom

    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = gaussian_filter(rng.normal(0, 1, tuple(max(4, n // 16) for n in shape)), 1.0)
        field = zoom(coarse, [n / m for n, m in zip(shape, coarse.shape, strict=True)], order=1)[
            : shape[0], : shape[1], : shape[2]
        ]
        image = (40 + 300 * field + rng.normal(0, 12, shape)).astype(np.int16)
        y, x = np.mgrid[-1 : 1 : shape[1] * 1j, -1 : 1 : shape[2] * 1j]
        image[:, (y / 0.7) ** 2 + (x / 0.9) ** 2 > 1] = -1000
        mask = np.zeros(shape, np.uint8)
        mask[shape[0] // 4 : shape[0] // 2, (y + 0.2) ** 2 + (x - 0.3) ** 2 < 0.05] = 1
        mask[shape[0] // 3 : shape[0] * 3 // 4, (y - 0.3) ** 2 + (x + 0.3) ** 2 < 0.02] = 2
        for array, path in (
            (image, folder / "imagesTr" / f"case_{number:03d}_0000.nii.gz"),
            (mask, folder / "labelsTr" / f"case_{number:03d}.nii.gz"),
        ):
            volume = sitk.GetImageFromArray(array)
            volume.SetSpacing((0.8, 0.8, 2.5))
            sitk.WriteImage(volume, str(path), True)
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def read_one(path: str) -> int:
    """Read a file with SimpleITK on one thread; returns the peak memory of this process in kB."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sitk.GetArrayViewFromImage(sitk.ReadImage(path)).shape  # noqa: B018
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read_all(folder: Path, workers: int) -> tuple[float, int]:
    """Measure seconds and peak kB of a worker for reading every image and mask with SimpleITK."""
    files = sorted(str(p) for p in folder.glob("*/*.nii.gz"))
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        peak = max(pool.map(read_one, files))
    return time.perf_counter() - start, peak


def prepare_all(folder: Path, out: Path, workers: int) -> tuple[float, int]:
    """Measure seconds and peak kB of the largest process for `medsam2 prepare`, as a user runs it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    command = [sys.executable, "-m", "medsam2.cli.main", "prepare", str(folder), "--out", str(out)]
    start = time.perf_counter()
    subprocess.run([*command, "--workers", str(workers)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return seconds, max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small set, under a minute")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is stated")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", type=Path, help="folder for the generated volumes; used again where it exists")
    arguments = parser.parse_args()
    count, shape = (6, (60, 256, 256)) if arguments.quick else (40, (120, 512, 512))
    scratch = Path(tempfile.mkdtemp(prefix="medsam2-prepare-"))
    data = (arguments.keep or scratch) / f"Dataset900_{count}"
    try:
        if not data.exists():
            print(f"writing {count} volumes of {shape[2]} x {shape[1]} x {shape[0]} ...", file=sys.stderr)
            write_volumes(data, count, shape)
        ours, peers = [], []
        for run in range(arguments.runs):
            peers.append(read_all(data, arguments.workers))
            ours.append(prepare_all(data, scratch / f"shards{run}", arguments.workers))
            print(f"run {run}: prepare {ours[-1][0]:.1f} s, reading alone {peers[-1][0]:.1f} s", file=sys.stderr)
            shutil.rmtree(scratch / f"shards{run}")
        seconds, reading = (statistics.median(s for s, _ in runs) for runs in (ours, peers))
        peak, peer_peak = (max(k for _, k in runs) for runs in (ours, peers))
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(ours, peers, strict=True))
        raw = count * np.prod(shape) * 3 / 1e6  # int16 image and uint8 mask
        print(
            json.dumps(
                {
                    "name": "prepare",
                    "machine": f"{platform.machine()}, {arguments.workers} processes",
                    "ours": {
                        "seconds": round(seconds, 2),
                        "volumes_a_second": round(count / seconds, 2),
                        "mb_a_second": round(raw / seconds, 1),
                        "peak_mb": round(peak / 1e3),
                    },
                    "peer": {"what": "SimpleITK, reading alone", "seconds": round(reading, 2),
                             "peak_mb": round(peer_peak / 1e3)},
                    "ratio_time": round(ratio, 2),
                    "ratio_memory": round(peak / peer_peak, 2),
                }
            )
        )  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
