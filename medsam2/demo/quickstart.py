"""`make quickstart`: run the commands that a user would type, one after another, and time them.

Each stage is a real command, and the summary is read from the files that the commands write.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medsam2.errors import UserError, explain_errors
from medsam2.files import atomic_write, new_folder

REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUT = Path("runs/quickstart")
NEW_FAMILY = "wall"  # the shipped checkpoint was not trained on this family
TOTAL = "all"


class Stage(NamedTuple):
    """One command, as a user types it ("medsam2 ...", "python train.py ..."), and its purpose."""

    name: str
    purpose: str
    command: str


def stages(output: Path) -> list[Stage]:
    """List the stages from generated cases to a checkpoint that Meta's code opens."""
    cases, shards, run = f"{output}/cases", f"{output}/shards", f"{output}/run"
    return [
        Stage(
            "new cases",
            f"write generated scans and clips of a new family, '{NEW_FAMILY}', in real file formats",
            f"medsam2 demo cases {cases}/new --only {NEW_FAMILY} --cases 40 --seed 1",
        ),
        Stage(
            "old cases",
            "write cases of the known families too, so that the model does not forget them",
            f"medsam2 demo cases {cases}/old --without {NEW_FAMILY} --cases 80 --seed 2",
        ),
        Stage(
            "prepare",
            "turn them into shards, split by patient",
            f"medsam2 prepare {cases} --out {shards} --split 0.8,0.2",
        ),
        Stage(
            "train",
            f"fine-tune the shipped checkpoint; it never saw the family '{NEW_FAMILY}'",
            f"python train.py experiment=quickstart data.shards={shards} output={run}",
        ),
        Stage(
            "evaluate",
            "score it on the held-out patients, before and after",
            f"python evaluate.py 'checkpoint=[nano,{run}]' 'labels=[before,after]' data.source={shards} "
            f"output={output}/evaluation limit=6",
        ),
        Stage(
            "export",
            "write the official format; Meta's video predictor must give the same masks on a held-out volume",
            f"medsam2 export --checkpoint {run} --to sam2 --out {output}/export --case {shards}",
        ),
    ]


def run(stage: Stage, number: int, count: int) -> dict[str, Any]:
    """Print and run one stage in the repository, and return its name, command and seconds.

    Raises:
        UserError: the command failed.
    """
    print(f"\n[{number}/{count}] {stage.purpose}\n$ {stage.command}", flush=True)
    program, *arguments = shlex.split(stage.command)
    module = ["-m", "medsam2.cli.main"] if program == "medsam2" else []
    start = time.perf_counter()
    status = subprocess.run([sys.executable, *module, *arguments], cwd=REPOSITORY, check=False).returncode
    if status:
        raise UserError(
            f"the stage {stage.name!r} ended with status {status}; see its output above. Command: {stage.command}"
        )
    return {"name": stage.name, "command": stage.command, "seconds": round(time.perf_counter() - start, 1)}


def build_summary(output: Path, stage_times: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collect `summary.json`: seconds of each stage, scores before and after, differences of the export."""
    evaluation = json.loads((output / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    totals = [group for group in evaluation["groups"] if group["dataset"] == TOTAL]
    return {
        "stages": list(stage_times),
        "seconds": round(sum(stage["seconds"] for stage in stage_times), 1),
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "by_modality": {g["modality"]: g for g in totals if g["modality"] != TOTAL},
        "by_structure": {g["structure"]: g for g in totals if g["structure"] != TOTAL},
        "all": next(g for g in totals if (g["modality"], g["structure"]) == (TOTAL, TOTAL)),
        "export": json.loads((output / "export" / "verify.json").read_text(encoding="utf-8")),
    }


def print_summary(summary: dict[str, Any], output: Path) -> None:
    """Print the summary as tables, and list the files to open."""
    from medsam2.reporting.tables import Table, numbers, print_table, words

    stages = [*summary["stages"], {"name": "together", "seconds": summary["seconds"]}]
    times = tuple((stage["name"], float(stage["seconds"])) for stage in stages)
    print_table(Table("Time", (*words("stage"), *numbers("seconds", digits=1)), times))
    rows = []
    for name, group in [*summary["by_modality"].items(), *summary["by_structure"].items(), ("all", summary["all"])]:
        change = group["dsc_change"] or {"mean": None}
        text = "-" if change["mean"] is None else f"{change['mean']:+.3f}"
        if change["mean"] is not None and change["low"] is not None:
            text += f" ({change['low']:+.3f} to {change['high']:+.3f})"
        rows.append((name, group["patients"], *group["dsc"].values(), text, *group["nsd"].values()))
    columns = (*words("held-out"), *numbers("patients", "DSC before", "after", "change (95 % interval)"))
    columns = (*columns, *numbers("NSD before", "after"))
    print_table(Table("Before and after fine-tuning", columns, tuple(rows)))
    export = summary["export"]
    print(
        f"\nThe official predictor's masks overlap ours by {export['iou']:.5f} (IoU) on {export['clip']}; largest "
        f"difference of logits {export['max_logit_difference']:.2g}.\n\nResults:\n"
        f"  {output}/evaluation/report.html     scores per case, with pictures\n"
        f"  {output}/evaluation/overlays/       masks before and after\n"
        f"  {output}/run/report.html            the run on one page: curves, validation, pictures\n"
        f"  {output}/export/README.md           how others load the result\n"
        f"  {output}/summary.json               all of the above as numbers"
    )


@explain_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Run all stages; refuse an output folder that is not empty."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m medsam2.demo.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"a new folder (default: {OUTPUT})")
    output: Path = parser.parse_args(arguments).output
    if not (REPOSITORY / "train.py").is_file():
        raise UserError("the quick start runs train.py and evaluate.py: run it in a checkout of the repository.")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} exists already: remove it (rm -r {output}) or give another folder with --output.")
    folder = new_folder(REPOSITORY / output)
    all_stages = stages(output)
    stage_times = [run(stage, number, len(all_stages)) for number, stage in enumerate(all_stages, start=1)]
    summary = build_summary(folder, stage_times)
    with atomic_write(folder / "summary.json") as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode("utf-8"))
    print_summary(summary, output)


if __name__ == "__main__":
    main()
