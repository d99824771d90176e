"""Time and memory of predicting a volume; peer: the official video predictor on the same weights and frames.

    python benchmarks/predict.py               # half an hour on two cores
    python benchmarks/predict.py --quick       # about a minute
    python benchmarks/predict.py --long        # memory over a clip of 5,000 frames: docs/images/predict-memory.png

Hiera tiny with random weights, 13 slices of 512 px (quick: 5 of 256), a box on the middle slice for each object,
propagated in both directions; 1, 4 and 8 objects. Each side runs in separate processes, in turn, after one run that is
not timed. "lesion flow" restarts the official predictor for each object and direction, as MedSAM2's script for lesions
does. The official predictor encodes its first frame when it starts; this is part of its time. Seconds are wall time,
and "CPU s" the time of all threads, which depends less on other load. Memory is the peak above an idle process (on a
GPU, allocated memory). "equal" is the intersection over union of our masks and the official ones, over all objects and
frames. Operators are those of one tracked frame, without encoding; on a GPU they limit the speed.

Ends with one line of JSON: `ratio_time` and `ratio_memory` are ours over the official predictor's with 8 objects.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from predict_work import Work
from train_step import write_weights

HERE = Path(__file__).resolve().parent
OFFICIAL, OURS, HALF, LESIONS = "official", "ours", "ours, bf16", "lesion flow"
AIMS = {1: 0.95, 4: 0.92, 8: 0.92}
HALF_AIM, LESION_AIM, OPERATOR_AIM = 0.7, 0.47, 1 / 3


@dataclass
class Timed:
    """Results of the processes of one variant."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    memory_mb: float = 0.0
    masks: str = ""

    def row(self) -> dict[str, float]:
        return {
            "seconds": round(statistics.median(self.seconds), 3),
            "cpu_seconds": round(statistics.median(self.cpu_seconds), 3),
            "memory_mb": round(self.memory_mb, 1),
        }


def run(script: str, work: Work, threads: int) -> dict[str, Any]:
    """Run a script beside this one in a separate process, and return the JSON that it prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-W", "ignore", str(HERE / script), work.text()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        sys.exit(lines[-1] if lines else f"{script} ended by {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def variants(work: Work, lesions: bool) -> dict[str, tuple[str, Work]]:
    found = {OFFICIAL: ("peer_predict.py", work), OURS: ("predict_ours.py", work)}
    if work.device == "cpu":
        found[HALF] = ("predict_ours.py", replace(work, half=True))
    if lesions:
        found[LESIONS] = ("peer_predict.py", replace(work, lesions=True))
    return found


def compare(work: Work, folder: Path, arguments: argparse.Namespace) -> dict[str, Timed]:
    """Measure all variants in turn."""
    lesions = work.objects == arguments.lesions
    found = {name: Timed() for name in variants(work, lesions)}
    for _ in range(arguments.runs):
        for name, (script, task) in variants(work, lesions).items():
            masks = str(folder / f"{name.replace(', ', '-').replace(' ', '-')}-{work.objects}.npy")
            result = run(script, replace(task, masks=masks), arguments.threads)
            found[name].seconds += result["seconds"]
            found[name].cpu_seconds += result["cpu_seconds"]
            found[name].memory_mb = max(found[name].memory_mb, result["memory_mb"])
            found[name].masks = masks
            print(f"{work.objects} objects, {name}: {result}", file=sys.stderr)
    return found


def agreement(first: str, second: str) -> float:
    """Return the intersection over union of two files of masks; 1 if both are empty."""
    import numpy as np

    a, b = np.load(first), np.load(second)
    either = int((a | b).sum())
    return float((a & b).sum() / either) if either else 1.0


def show(objects: int, found: dict[str, Timed]) -> dict[str, dict[str, float]]:
    """Print a table with ratios to the official predictor (for the lesion flow, of ours to it)."""
    rows = {name: timed.row() for name, timed in found.items()}
    base, ours = rows[OFFICIAL], rows[OURS]
    print(f"\n{objects} object{'s' if objects > 1 else ''}")
    print(f"{'':16}{'seconds':>9}{'CPU s':>9}{'MiB':>8}{'time':>8}{'CPU':>7}{'memory':>8}{'equal':>10}   aim (time)")
    aims = {OURS: AIMS.get(objects), HALF: HALF_AIM}
    for name, row in rows.items():
        ratios = [row[key] / base[key] for key in ("seconds", "cpu_seconds", "memory_mb")]
        row["equal"] = agreement(found[name].masks, found[OFFICIAL].masks)
        aim = aims.get(name)
        print(
            f"{name:16}{row['seconds']:9.2f}{row['cpu_seconds']:9.2f}{row['memory_mb']:8.0f}{ratios[0]:8.2f}"
            f"{ratios[1]:7.2f}{ratios[2]:8.2f}{row['equal']:10.6f}   {'' if aim is None else f'{aim:g}'}"
        )
    if LESIONS in rows:
        wall, processor = (ours[key] / rows[LESIONS][key] for key in ("seconds", "cpu_seconds"))
        print(f"ours over the lesion flow: time {wall:.2f}, CPU {processor:.2f} (aim {LESION_AIM:g})")
    return rows


def count(work: Work, threads: int) -> dict[str, int]:
    """Operators of one tracked frame."""
    task = replace(work, count=True)
    scripts = {OFFICIAL: "peer_predict.py", OURS: "predict_ours.py"}
    found = {name: int(run(script, task, threads)["operators"]) for name, script in scripts.items()}
    share = found[OURS] / found[OFFICIAL]
    print(
        f"\noperators of a frame with {work.objects} objects: {found[OURS]} of {found[OFFICIAL]}, "
        f"{share:.2f} (aim {OPERATOR_AIM:.2f})"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 frames of 256 px and two objects, about a minute")
    parser.add_argument("--long", action="store_true", help="only the memory over a long clip")
    parser.add_argument("--long-frames", type=int, default=5000)
    parser.add_argument("--objects", type=int, nargs="+", help="1, 4 and 8 by default")
    parser.add_argument("--lesions", type=int, default=0, help="objects at which the lesion flow runs: 4, quick 2")
    parser.add_argument("--runs", type=int, default=1, help="processes of each variant")
    parser.add_argument("--timed", type=int, default=1, help="timed runs of a process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    if arguments.long:
        import predict_long

        predict_long.main(arguments.long_frames)
        return
    arguments.lesions = arguments.lesions or (2 if arguments.quick else 4)
    side, frames = (256, 5) if arguments.quick else (512, 13)
    results: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="medsam2-predict-") as folder:
        weights = Path(folder) / "sam2.pt"
        write_weights(weights)
        for objects in arguments.objects or ([2] if arguments.quick else [1, 4, 8]):
            work = Work(str(weights), side, frames, objects, runs=arguments.timed, device=arguments.device)
            results[objects] = show(objects, compare(work, Path(folder), arguments))
        operators = count(Work(str(weights), side, frames, 8), arguments.threads)
    most = results[max(results)]
    ratios = {key: round(most[OURS][key] / most[OFFICIAL][key], 3) for key in ("seconds", "cpu_seconds", "memory_mb")}
    report = {
        "name": "predict",
        "machine": f"{platform.machine()}, {arguments.threads} threads, {arguments.device}",
        "clip": f"{frames} frames of {side} px, objects {', '.join(map(str, results))}",
        "ours": {str(n): {k: v for k, v in rows.items() if k.startswith(OURS)} for n, rows in results.items()},
        "peer": {str(n): {k: v for k, v in rows.items() if not k.startswith(OURS)} for n, rows in results.items()},
        "operators": operators,
        "ratio_time": ratios["seconds"],
        "ratio_cpu_time": ratios["cpu_seconds"],
        "ratio_memory": ratios["memory_mb"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
