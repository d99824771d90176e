"""Training curves of full, decoder-only and LoRA fine-tuning in one figure; peer: full fine-tuning.

    python benchmarks/adaptation.py            # a quarter of an hour on one core
    python benchmarks/adaptation.py --quick    # a few steps, a minute

Trains the shipped nano on a generated family that was not in its pretraining, with the same steps, clips and validation
cases for each adaptation and half of the clips from the old families. The figure shows the training loss, DSC on the
new and on the old datasets, and the share of boxes whose mask overlaps their own object most ("boxes obeyed").
`curves.png` and a table are written to --out. A second run with the same --out trains only missing adaptations.

Ends with one line of JSON: `ratio_time` and `ratio_memory` are LoRA over full fine-tuning.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retention import FAMILY, OLD, make_shards, run

ADAPTATIONS = {"full": "full", "decoder only": "decoder", "LoRA": "lora_all"}
COLOURS = {"full": "tab:blue", "decoder only": "tab:orange", "LoRA": "tab:green"}
SCORES = {
    "val/gain": "DSC, new family",
    "val/retention": "DSC, old families",
    "val/obedience": "boxes obeyed",
}


@dataclass(frozen=True)
class Curve:
    """One adaptation: step -> value of each logged number, scores of the starting model, and cost of the training."""

    values: dict[str, dict[int, float]]
    seconds: float
    peak_mb: float
    trained: int

    def scores(self, name: str) -> list[tuple[int, float]]:
        """Scores by step, from the starting model (step 0) on."""
        start = next(iter(self.values[f"{name}_start"].values()))
        return [(0, start), *((step + 1, value) for step, value in sorted(self.values[name].items()))]


def train(adaptation: str, shards: Path, output: Path, steps: int, every: int) -> None:
    """Fine-tune once and store time and memory beside the run."""
    seconds, peak = run(
        [
            *("train.py", "experiment=quickstart", f"data.shards={shards}", f"output={output}", "resume=auto"),
            *(
                f"adaptation={adaptation}",
                "retention=replay",
                OLD,
                f"trainer.max_steps={steps}",
                f"trainer.val_every={every}",
            ),
            *("data.workers=0", "trainer.threads=1", "trainer.progress=none", "trainer.log_every=2"),
            *("validation.cases=2", f"trainer.checkpoint_every={steps}"),
        ]
    )
    (output / "cost.json").write_text(json.dumps({"seconds": seconds, "peak_mb": peak}) + "\n")


def read_curve(output: Path) -> Curve:
    values: dict[str, dict[int, float]] = {}
    with (output / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if text and name != "step":
                    values.setdefault(name, {})[int(row["step"])] = float(text)
    cost = json.loads((output / "cost.json").read_text())
    return Curve(values, cost["seconds"], cost["peak_mb"], count_trained(output / "checkpoints" / "last.ckpt"))


def count_trained(checkpoint: Path) -> int:
    """Count the trained numbers: those with optimiser moments in the checkpoint."""
    import torch

    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return sum(s["exp_avg"].numel() for s in state["optimizer_states"][0]["state"].values())


def draw(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, panels = plt.subplots(1, 4, figsize=(16, 3.8), constrained_layout=True)
    for name, curve in curves.items():
        steps, losses = zip(*sorted(curve.values["train/loss"].items()), strict=True)
        width = min(9, len(losses))
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        panels[0].plot(steps, losses, color=COLOURS[name], alpha=0.2, linewidth=0.8)
        panels[0].plot(steps[width - 1 :], smooth, color=COLOURS[name], label=f"{name}, {curve.trained / 1e6:.2f} M")
        for panel, score in zip(panels[1:], SCORES, strict=True):
            panel.plot(*zip(*curve.scores(score), strict=True), "o-", markersize=3, color=COLOURS[name])
    for panel, title in zip(panels, ["training loss", *SCORES.values()], strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
    panels[0].set_yscale("log")
    panels[0].legend(title="trained parameters", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(curves: dict[str, Curve]) -> str:
    """In Markdown: before and after."""
    lines = [
        "| adaptation | trained | " + " | ".join(SCORES.values()) + " | minutes | peak MB |",
        "|---" * (len(SCORES) + 4) + "|",
    ]
    for name, curve in curves.items():
        cells = [f"{curve.scores(key)[0][1]:.3f} -> {curve.scores(key)[-1][1]:.3f}" for key in SCORES]
        lines.append(
            f"| {name} | {curve.trained:,} | {' | '.join(cells)} | {curve.seconds / 60:.1f} | {curve.peak_mb:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, a minute")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--out", type=Path, default=Path("runs/adaptation"))
    parser.add_argument("--shards", type=Path, help="of the quick start's cases; made where they are not given")
    parser.add_argument("--figure", type=Path, help="default: curves.png in --out")
    arguments = parser.parse_args()
    folder = (arguments.out / "quick" if arguments.quick else arguments.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps = 4 if arguments.quick else arguments.steps
    shards = arguments.shards.resolve() if arguments.shards else folder / "shards"
    if not (shards / "index.arrow").exists():
        shards = make_shards(folder, 6 if arguments.quick else 40)
    curves = {}
    for name, adaptation in ADAPTATIONS.items():
        output = folder / adaptation
        if not (output / "cost.json").exists():
            train(adaptation, shards, output, steps, max(steps // 5, 1))
        curves[name] = read_curve(output)
        draw(curves, arguments.figure or folder / "curves.png")
    print(table(curves))
    full, lora = curves["full"], curves["LoRA"]
    print(
        json.dumps(
            {
                "name": "adaptation",
                "machine": f"{platform.machine()}, 1 thread",
                "new_family": FAMILY,
                "ours": {name: {key: round(c.scores(key)[-1][1], 3) for key in SCORES} for name, c in curves.items()},
                "peer": {"method": "full", "seconds": round(full.seconds, 1), "peak_mb": round(full.peak_mb)},
                "ratio_time": round(lora.seconds / full.seconds, 2),
                "ratio_memory": round(lora.peak_mb / full.peak_mb, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
