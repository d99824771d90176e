"""Kill a run by SIGKILL at random moments, go on each time, and compare with an undisturbed run.

    python tests/kill_loop.py OUTPUT [--kills 100] [--steps 600] [--seed 0]

Writes a line a kill to OUTPUT/kills.log, and ends with a line of JSON. Torch is loaded once: each attempt is a fork.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ranks import SMALLEST, column, losses, written
from small_shards import build

from medsam2.config import compose
from medsam2.training.fit import fit
from medsam2.training.run_folder.resume import peek

SAME = ("train/loss", "train/grad_norm", "val/loss")
LIMIT = 600.0  # seconds for one attempt


@dataclass(frozen=True)
class Kill:
    """logged, saved: steps that are in metrics.csv, and in last.ckpt. unfinished: files that were being written."""

    logged: int
    saved: int
    unfinished: int

    def __str__(self) -> str:
        more = "  while a file was written" if self.unfinished else ""
        return f"SIGKILL: logged to step {self.logged:4d}, saved at step {self.saved:4d}{more}"


def arguments(shards: Path, output: Path, steps: int) -> list[str]:
    """The cheapest run that has everything: checkpoints every 3 steps, validation every 5, accumulation."""
    return [
        *SMALLEST, f"data.shards={shards}", f"output={output}", f"trainer.max_steps={steps}",
        "trainer.checkpoint_every=3", "trainer.val_every=5", "validation.clips=1", "data.clips_per_batch=1",
        "trainer.accumulate=2", "trainer.progress=none", "resume=auto", "module=ranks.Dropping",
    ]  # fmt: skip


def attempt(words: list[str], log: Path) -> int:
    """Fork a process that runs (on) and writes what it prints to `log`; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        fit(compose("train", words))
        status = 0
    finally:
        os._exit(status)


def ended(child: int, seconds: float, until: Callable[[], bool] = lambda: False) -> int | None:
    """The status of a process, None where it still runs after so many seconds, or when `until` holds."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end or until():
            return None
        time.sleep(0.005)


def finish(words: list[str], log: Path) -> None:
    status = ended(attempt(words, log), LIMIT)
    if status != 0:
        raise SystemExit(f"the run did not end well (status {status}): {log.read_text()[-3000:]}")


def kill_once(words: list[str], output: Path, log: Path, steps: int, seconds: float) -> Kill | None:
    """Kill the run `seconds` after it has logged `steps` more than were saved (0: begun); None where it ended first."""
    before, target = stamp(output), saved(output) + steps
    child = attempt(words, log)
    status = ended(child, LIMIT, lambda: stamp(output) != before)
    if status is None and steps:
        before = written(output)
        status = ended(
            child, LIMIT, lambda: written(output) != before and max(losses(output), default=-1) + 1 >= target
        )
    if status is None:
        status = ended(child, seconds)
    if status is not None:
        if status == 0:
            return None
        raise SystemExit(f"the run ended by itself with status {status}: {log.read_text()[-3000:]}")
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    unfinished = len(list(output.rglob(".*.partial")))
    return Kill(max(losses(output), default=-1) + 1, saved(output), unfinished)


def saved(output: Path) -> int:
    """The step that a resumed run goes on from."""
    paths = (output / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    path = next((path for path in paths if path.exists()), None)
    return int(peek(path)["global_step"]) if path else 0


def stamp(output: Path) -> int:
    """When the events of a run were written last: once, as training begins."""
    path = output / "events.csv"
    return path.stat().st_mtime_ns + path.stat().st_size if path.exists() else 0


def differences(ours: Path, theirs: Path) -> list[str]:
    """The first figure of each column of metrics.csv that is not the same to the last bit."""
    found = []
    for name in SAME:
        one, two = column(ours, name), column(theirs, name)
        steps = [step for step in sorted({*one, *two}) if one.get(step) != two.get(step)]
        if steps or not two:
            found += [f"{name} at step {step}: {one.get(step)} and {two.get(step)}" for step in steps[:1] or [0]]
    return found


def kill_loop(output: Path, kills: int, steps: int, seed: int) -> dict[str, object]:
    """Run the loop; what is found. A kill comes 0 to 6 steps after the step that was saved, and up to 0.2 s later."""
    output.mkdir(parents=True)
    draw, shards, log = random.Random(seed), build(output / "shards"), output / "run.log"
    finish(arguments(shards, output / "whole", steps), log)
    words, done = arguments(shards, output / "killed", steps), []
    with open(output / "kills.log", "w", encoding="utf-8") as file:
        while len(done) < kills:
            kill = kill_once(words, output / "killed", log, draw.randint(0, 6), draw.uniform(0.0, 0.2))
            if kill is None:
                break
            done.append(kill)
            print(f"{len(done):4d}  {kill}", file=file, flush=True)
        finish(words, log)
        found = differences(output / "killed", output / "whole")
        said = {
            "kills": len(done), "while_writing": sum(kill.unfinished > 0 for kill in done), "steps": steps,
            "seed": seed, "differences": found,
        }  # fmt: skip
        print(json.dumps(said), file=file, flush=True)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    for name, value in (("kills", 100), ("steps", 600), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    os.environ.setdefault("MEDSAM2_SALT", "kill loop")
    said = kill_loop(given.output, given.kills, given.steps, given.seed)
    print(json.dumps(said))
    sys.exit(bool(said["differences"]) or said["kills"] != given.kills)


if __name__ == "__main__":
    main()
