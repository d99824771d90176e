"""Time and memory of one training step; peer: Meta's `SAM2Train` on the same weights, clip and corrections.

    make peers && python benchmarks/train_step.py      # half an hour on two cores; needs 22 GiB
    python benchmarks/train_step.py --quick            # about a minute

Hiera tiny, one clip of 8 frames of 512 px (quick: 4 of 256), a click on the first frame, 7 corrections on it and on the
middle one. Each side runs in separate processes, in turn. Meta's published step has dropout 0.1 in the memory
attention; it also runs with 0. Ours runs in fp32, in bfloat16, with all parts checkpointed, and with a frozen image
encoder. Seconds are wall time, and "CPU s" the time of all threads, which depends less on other load. Memory is the
peak above an idle process (on a GPU, allocated memory).

Ends with one line of JSON: `ratio_time` and `ratio_memory` are ours in fp32 over Meta's as published, with one object.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from train_work import Work

HERE = Path(__file__).resolve().parent
PARTS = ("image_encoder", "memory_attention", "mask_decoder", "memory_encoder")
# ratios (time, memory) to Meta's published step, in fp32 on a CPU
AIMS = {
    "ours": (0.88, 0.55),
    "ours, bf16": (0.65, 0.4),
    "ours, checkpointed": (1.2, 0.3),
    "ours, encoder frozen": (0.6, None),
}
PUBLISHED, WITHOUT_DROPOUT = "Meta, as published", "Meta, dropout 0"


def variants(work: Work) -> dict[str, tuple[str, Work]]:
    """Return script and task by name. On a GPU all use bfloat16, as training does."""
    base = replace(work, half=work.device == "cuda")
    found = {
        PUBLISHED: ("peer_train.py", replace(base, dropout=0.1)),
        "ours": ("train_ours.py", base),
        WITHOUT_DROPOUT: ("peer_train.py", base),
        "ours, checkpointed": ("train_ours.py", replace(base, checkpoint=PARTS)),
        "ours, encoder frozen": ("train_ours.py", replace(base, frozen=True)),
    }
    if work.device == "cpu":
        found["ours, bf16"] = ("train_ours.py", replace(base, half=True))
    return found


def run(script: str, work: Work, threads: int) -> dict[str, Any]:
    """Run a script beside this one in a separate process, and return the JSON that it prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-W", "ignore", str(HERE / script), work.text()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{script} ended by {done.returncode}"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(work: Work, runs: int, threads: int, only: list[str]) -> dict[str, dict[str, float]]:
    """Return the medians over all timed steps and the peak memory, by variant."""
    tasks = {name: task for name, task in variants(work).items() if not only or name in (PUBLISHED, *only)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
    for _ in range(runs):
        for name, (script, task) in tasks.items():
            found[name].append(run(script, task, threads))
            print(f"{work.objects} objects, {name}: {found[name][-1]}", file=sys.stderr)
    return {
        name: {
            "seconds": statistics.median(s for result in results for s in result["seconds"]),
            "cpu_seconds": statistics.median(s for result in results for s in result["cpu_seconds"]),
            "memory_mb": max(result["memory_mb"] for result in results),
            "loss": results[-1]["loss"],
        }
        for name, results in found.items()
    }


def show(objects: int, found: dict[str, dict[str, float]]) -> None:
    """Print a table with ratios to Meta's published step."""
    base = found[PUBLISHED]
    print(f"\n{objects} object{'s' if objects > 1 else ''}")
    print(f"{'':24}{'seconds':>9}{'CPU s':>9}{'MiB':>8}{'time':>8}{'CPU':>7}{'memory':>8}   aims (time, memory)")
    for name, row in found.items():
        ratios = [row[key] / base[key] for key in ("seconds", "cpu_seconds", "memory_mb")]
        aims = ", ".join("-" if aim is None else f"{aim:g}" for aim in AIMS.get(name, ()))
        print(
            f"{name:24}{row['seconds']:9.2f}{row['cpu_seconds']:9.2f}{row['memory_mb']:8.0f}"
            f"{ratios[0]:8.2f}{ratios[1]:7.2f}{ratios[2]:8.2f}   {aims}"
        )


def write_weights(path: Path) -> None:
    """Write random weights of hiera tiny that predict all objects present, so that losses compare."""
    import torch

    from medsam2.model.build import ModelSpec, build_sam

    torch.manual_seed(0)
    sam = build_sam(ModelSpec("hiera_tiny"))
    torch.nn.init.constant_(sam.sam_mask_decoder.pred_obj_score_head.layers[2].bias, 20.0)
    torch.save({"model": sam.state_dict()}, path)


def rounded(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {key: round(value, 3) for key, value in row.items()} for name, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 frames of 256 px and one object, about a minute")
    parser.add_argument("--objects", type=int, nargs="+", help="1 and 3 by default")
    parser.add_argument("--runs", type=int, default=1, help="processes of each variant")
    parser.add_argument("--steps", type=int, help="timed steps of a process: 2, quick 1")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=[], help="names of variants beside Meta's as published")
    arguments = parser.parse_args()
    side, frames = (256, 4) if arguments.quick else (512, 8)
    steps = arguments.steps or (1 if arguments.quick else 2)
    results: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="medsam2-train-") as folder:
        weights = Path(folder) / "sam2.pt"
        write_weights(weights)
        for objects in arguments.objects or ([1] if arguments.quick else [1, 3]):
            work = Work(str(weights), side, frames, objects, steps=steps, device=arguments.device)
            results[objects] = compare(work, arguments.runs, arguments.threads, arguments.only)
            show(objects, results[objects])
    first = next(iter(results.values()))
    ours = first.get("ours", first[PUBLISHED])
    report = {
        "name": "train_step",
        "machine": f"{platform.machine()}, {arguments.threads} threads, {arguments.device}",
        "clip": f"{frames} frames of {side} px, objects {', '.join(map(str, results))}",
        "ours": {str(n): {k: v for k, v in rounded(r).items() if k.startswith("ours")} for n, r in results.items()},
        "peer": {str(n): {k: v for k, v in rounded(r).items() if k.startswith("Meta")} for n, r in results.items()},
        "ratio_time": round(ours["seconds"] / first[PUBLISHED]["seconds"], 3),
        "ratio_cpu_time": round(ours["cpu_seconds"] / first[PUBLISHED]["cpu_seconds"], 3),
        "ratio_memory": round(ours["memory_mb"] / first[PUBLISHED]["memory_mb"], 3),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
