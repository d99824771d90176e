"""Gain and forgetting of fine-tuning, by method against forgetting; peer: plain fine-tuning.

    python benchmarks/retention.py            # about forty minutes on one idle core
    python benchmarks/retention.py --quick    # two methods, a few steps, a minute

Each method trains the shipped nano on a generated family that was not in its pretraining, with the same number of steps
and clips, on one thread. Gain is the increase of DSC on held-out cases of the new family, and loss the decrease on
those of the old families (box on the largest slice, propagated in both directions). The aim is at least 90 % of the
plain gain for a loss of at most 0.03. `results.json` and the figure are written after each method. A second run with
the same --out continues after the last complete method.

Ends with one line of JSON: `ratio_time` and `ratio_memory` are the training of the best method over the plain one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from medsam2.adaptation.interpolate import interpolate
from medsam2.adaptation.lora import official_state
from medsam2.evaluation.run.sources import load_cases
from medsam2.evaluation.settings import ProtocolSettings
from medsam2.files import atomic_write
from medsam2.model.build import load_model
from medsam2.model.tracker import Tracker
from medsam2.training.callbacks.validation import ValidationCase, probe_all
from medsam2.training.settings import ValidationSettings

ROOT = Path(__file__).resolve().parents[1]
FAMILY = "wall"
OLD = f"retention.new=['*{FAMILY}*']"
LONG = "long"  # twice the clips per step, so that as many are new as without replay, and twice the steps
NEW_ALONE = f"data.include=[{FAMILY}]"  # the case of a user with one dataset
DISTILLED = ("retention=[replay,distil_old]", OLD, "ema=0.99", LONG)
METHODS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "replay + L2 + average": ("retention=[replay,l2]", OLD, "retention.l2=30", "ema=0.98"),
    "long replay + distillation + average": DISTILLED,
    "long replay of 0.35 + distillation + average": (*DISTILLED, "retention.replay=0.35"),
    "long replay of 0.25 + distillation + average": (*DISTILLED, "retention.replay=0.25"),
    "replay + LoRA": ("retention=replay", OLD, "adaptation=lora_all"),
    "replay + distillation": ("retention=[replay,distil_old]", OLD),
    "replay": ("retention=replay", OLD),
    "L2 to the start": ("retention=l2", "retention.l2=100"),
    "LoRA": ("adaptation=lora_all",),
    "layer-wise rates": ("optim.layer_decay=0.6", "optim.module_lr={}"),
    "moving average": ("ema=0.98",),
    "distillation": ("retention=distillation",),
    "low rate": ("optim.lr=5e-5",),
}
INTERPOLATED = {
    "plain": (0.3, 0.5, 0.7),
    "replay + L2 + average": (0.7, 0.85),
    "long replay + distillation + average": (0.85,),
    "replay": (0.5, 0.7, 0.85),
    "replay + distillation": (0.7, 0.85),
    "replay + LoRA": (0.7, 0.85),
}
QUICK = ("plain", "replay")
AIM_GAIN, AIM_LOST = 0.9, 0.03


@dataclass(frozen=True)
class Result:
    """Result of a method: DSC on both kinds of data, share of obeyed boxes, and cost of the training."""

    method: str
    new: float
    old: float
    obedience: float
    seconds: float = 0.0
    peak_mb: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The size of the benchmark: scored cases per dataset, steps, clips per step, interpolations of a method."""

    cases: int
    steps: int
    clips: int
    between: int = 9


def run(command: list[str]) -> tuple[float, float]:
    """Run one command of the repository on one thread and return seconds and peak MB.

    Raises:
        SystemExit: the command failed; its output is shown.
    """
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=sys.stderr
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed with status {process.returncode}: {' '.join(command)}")
    return time.perf_counter() - start, used.ru_maxrss / 1e3


def make_shards(folder: Path, count: int) -> Path:
    """Prepare generated cases as in the quick start: `count` of the new family per modality, twice as many old ones."""
    medsam2, cases = ["-m", "medsam2.cli.main"], folder / "cases"
    for place, which, number, seed in (("new", "--only", count, 1), ("old", "--without", 2 * count, 2)):
        run([*medsam2, "demo", "cases", f"{cases}/{place}", which, FAMILY, "--cases", f"{number}", "--seed", f"{seed}"])
    run([*medsam2, "prepare", str(cases), "--out", f"{folder}/shards", "--split", "0.8,0.2"])
    return folder / "shards"


def train(method: str, shards: Path, folder: Path, plan: Plan) -> tuple[Path, float, float]:
    """Fine-tune with one method; return the run folder, seconds and peak MB."""
    output = folder / method.replace(" + ", "_").replace(" ", "_")
    lines = METHODS[method] if OLD in METHODS[method] else (NEW_ALONE, *METHODS[method])
    longer = 2 if LONG in lines else 1
    seconds, peak = run(
        [
            *("train.py", "experiment=quickstart", f"data.shards={shards}", f"output={output}", "resume=auto"),
            *(f"trainer.max_steps={longer * plan.steps}", "data.workers=0"),
            *("trainer.threads=1", "validation.cases=0", "trainer.progress=none", "trainer.log_every=5", "ema=null"),
            *(f"data.clips_per_batch={longer * plan.clips}", *(line for line in lines if line != LONG)),
        ]
    )
    return output / "checkpoints" / "last.ckpt", seconds, peak


class Scorer:
    """Scores weights on held-out cases of both kinds."""

    def __init__(self, shards: Path, cases: int) -> None:
        box = ProtocolSettings(name="box", slices="largest", prompt="box", direction="both")
        self.settings = ValidationSettings(cases=cases, protocols=(box,))
        self.cases = [ValidationCase(case, old=FAMILY not in case.dataset) for case in load_cases(shards, "val", cases)]
        self.sam = load_model("nano").sam
        self.start = {name: value.clone() for name, value in official_state(self.sam).items()}

    def score(self, method: str, state: dict[str, torch.Tensor], seconds: float = 0.0, peak: float = 0.0) -> Result:
        self.sam.load_state_dict(state)
        found = probe_all(Tracker(self.sam).eval(), self.cases, self.settings)
        return Result(method, found["val/gain"], found["val/retention"], found["val/obedience"], seconds, peak)


class Results:
    """The results so far, written to disk after each method."""

    def __init__(self, folder: Path, figure: Path) -> None:
        self.path, self.figure = folder / "results.json", figure
        found = json.loads(self.path.read_text()) if self.path.exists() else []
        self.rows = {row["method"]: Result(**row) for row in found}

    def add(self, result: Result) -> None:
        self.rows[result.method] = result
        with atomic_write(self.path) as file:
            file.write((json.dumps([asdict(row) for row in self.rows.values()], indent=1) + "\n").encode())
        print(f"{result.method}: new {result.new:.3f}, old {result.old:.3f}", file=sys.stderr, flush=True)
        if "plain" in self.rows:
            draw(self, self.figure)

    def gain(self, row: Result) -> float:
        return row.new - self.rows["start"].new

    def lost(self, row: Result) -> float:
        return self.rows["start"].old - row.old

    def share(self, row: Result) -> float:
        """The gain as a share of the plain gain."""
        return self.gain(row) / self.gain(self.rows["plain"])

    def best(self) -> Result:
        """Return the method with the smallest loss among those with enough gain, else that with the largest gain."""
        reached = [row for row in self.rows.values() if self.share(row) >= AIM_GAIN]
        return min(reached, key=self.lost) if reached else max(self.rows.values(), key=self.gain)

    def table(self) -> str:
        """Make a Markdown table, sorted by loss."""
        lines = ["| method | new DSC | gain | share of plain | old DSC | lost | boxes obeyed | minutes | peak MB |",
                 "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in sorted(self.rows.values(), key=self.lost):
            cost = f"{row.seconds / 60:.1f} | {row.peak_mb:.0f}" if row.seconds else " | "
            lines.append(
                f"| {row.method} | {row.new:.3f} | {self.gain(row):+.3f} | {self.share(row):.0%} | {row.old:.3f} "
                f"| {self.lost(row):+.3f} | {row.obedience:.2f} | {cost} |"
            )
        return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Draw gain against DSC on the old families, and the region of the aim."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 6), constrained_layout=True)
    plain = results.gain(results.rows["plain"])
    axes.axvspan(AIM_GAIN * plain, 3 * plain, ymin=0, color="tab:green", alpha=0.06)
    axes.axhspan(-AIM_LOST, 1, color="tab:green", alpha=0.06)
    for base in INTERPOLATED:
        family = [results.rows["start"], *(r for n, r in results.rows.items() if n.startswith(f"{base}, "))]
        if base in results.rows and len(family) > 1:
            line = sorted([*family, results.rows[base]], key=results.gain)
            axes.plot([results.gain(r) for r in line], [-results.lost(r) for r in line], "-", color="0.75", zorder=1)
    for row in results.rows.values():
        between = ", " in row.method
        combined = "+" in row.method
        colour = "tab:gray" if between else "tab:blue" if combined else "tab:orange"
        axes.scatter(results.gain(row), -results.lost(row), s=22 if between else 48, color=colour, zorder=2)
        label = row.method.rsplit(", ", 1)[-1].split()[0] if between else row.method
        axes.annotate(label, (results.gain(row), -results.lost(row)), (5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlim(left=-0.03, right=1.5 * max(results.gain(row) for row in results.rows.values()))
    axes.set_ylim(bottom=1.1 * min(-results.lost(row) for row in results.rows.values()) - 0.01, top=0.06)
    axes.set_xlabel("gain on the new family (DSC)")
    axes.set_ylabel("change on the old families (DSC)")
    axes.set_title("Fine-tuning: gain against retention (green: both aims; grey: shares of the way from the start)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure(results: Results, scorer: Scorer, shards: Path, folder: Path, methods: tuple[str, ...], plan: Plan) -> None:
    """Train, score and interpolate the methods that are not in `results` yet."""
    if "start" not in results.rows:
        results.add(scorer.score("start", scorer.start))
    for method in methods:
        between = {f"{method}, {share:g} of the way": share for share in INTERPOLATED.get(method, ())[: plan.between]}
        if {method, *between} <= results.rows.keys():
            continue
        checkpoint, seconds, peak = train(method, shards, folder, plan)
        end = official_state(load_model(checkpoint).sam)
        if method not in results.rows:
            results.add(scorer.score(method, end, seconds, peak))
        for name, share in between.items():
            if name not in results.rows:
                results.add(scorer.score(name, interpolate(scorer.start, end, share), seconds, peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two methods for a few steps, a minute")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--clips", type=int, default=4, help="of one step")
    parser.add_argument("--cases", type=int, default=3, help="of each of eight data sets, scored")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help="these methods (with plain)")
    parser.add_argument("--out", type=Path, default=Path("runs/retention"))
    parser.add_argument("--shards", type=Path, help="of the quick start's cases; made where they are not given")
    parser.add_argument("--figure", type=Path, help="default: retention.png in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = (arguments.out / "quick" if arguments.quick else arguments.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(1, 5, 2, 1) if arguments.quick else Plan(arguments.cases, arguments.steps, arguments.clips)
    methods = QUICK if arguments.quick else tuple(dict.fromkeys(("plain", *(arguments.only or METHODS))))
    shards = arguments.shards.resolve() if arguments.shards else folder / "shards"
    if not (shards / "index.arrow").exists():
        shards = make_shards(folder, 6 if arguments.quick else 40)
    results = Results(folder, arguments.figure or folder / "retention.png")
    measure(results, Scorer(shards, plan.cases), shards, folder, methods, plan)
    print(results.table())
    best, plain = results.best(), results.rows["plain"]
    print(
        json.dumps(
            {
                "name": "retention",
                "machine": f"{platform.machine()}, 1 thread",
                "ours": {"method": best.method, "share_of_gain": round(results.share(best), 3),
                         "lost": round(results.lost(best), 3)},
                "peer": {"method": "plain", "gain": round(results.gain(plain), 3),
                         "lost": round(results.lost(plain), 3)},
                "ratio_time": round(best.seconds / plain.seconds, 2) if plain.seconds else None,
                "ratio_memory": round(best.peak_mb / plain.peak_mb, 2) if plain.peak_mb else None,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
