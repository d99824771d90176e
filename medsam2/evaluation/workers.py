"""Worker processes of this machine, and waiting for the parts that others make."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from uuid import uuid4

from medsam2.errors import UserError
from medsam2.evaluation.parts import Failure, Part
from medsam2.evaluation.ranks import Rank, share
from medsam2.evaluation.running import Run, Watch
from medsam2.evaluation.settings import EvaluateSettings

TICK = 0.2  # seconds between looks at the folder
MENDED = 2  # exit status of a process that said what the user can mend
Work = Callable[[EvaluateSettings, Rank, int], None]


class Pending:
    """The cases whose parts are still to come from other processes."""

    def __init__(self, run: Run, numbers: Iterable[int], watch: Watch) -> None:
        self.run, self.watch, self.numbers = run, watch, set(numbers)

    def look(self) -> int:
        """Take note of what is there by now; how many parts are new."""
        found: list[Part] = []
        for number in sorted(self.numbers):
            name = self.run.names[number]
            part = self.run.parts.settled(name.key, name.state)
            if part is not None:
                found.append(part)
                self.numbers.discard(number)
        for part in found:
            self.watch(part)
        return len(found)


def wait_for_ranks(run: Run, numbers: Iterable[int], watch: Watch) -> None:
    """Rank 0: until the other ranks have settled their cases.

    Raises:
        UserError: no part came for `wait_minutes`.
    """
    pending = Pending(run, numbers, watch)
    last = time.monotonic()
    while pending.numbers:
        if pending.look():
            last = time.monotonic()
        elif time.monotonic() - last > 60 * run.settings.wait_minutes:
            raise UserError(
                f"{len(pending.numbers)} cases of other ranks are missing, and none was finished for "
                f"{run.settings.wait_minutes:g} minutes (wait_minutes); the same command with resume=true, on any "
                "number of ranks, goes on with them."
            )
        else:
            time.sleep(TICK)


def run_workers(run: Run, work: Work, launch: str, watch: Watch) -> None:
    """Share the cases among `workers` processes; one that is killed is replaced, and its case is named as a failure.

    Args:
        work: what a process does, given the settings, its rank, and how many threads it may use.
        launch: of the run that they join.

    Raises:
        UserError: a process said so, or one died before it had a case in hand.
    """
    settings = run.settings
    count = min(settings.workers, run.cases.count)
    threads = max(len(os.sched_getaffinity(0)) // count, 1)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork

    def start(index: int) -> BaseProcess:
        process = context.Process(target=work, args=(settings, Rank(index, count, index, launch), threads), daemon=True)
        process.start()
        return process

    processes = {index: start(index) for index in range(count)}
    pending = Pending(run, range(run.cases.count), watch)
    try:
        while processes:
            pending.look()
            for index, process in list(processes.items()):
                if process.is_alive():
                    continue
                process.join()
                del processes[index]
                if process.exitcode == MENDED:
                    raise UserError(f"worker {index} could not go on, for the reason above.")
                if process.exitcode:
                    _name_killed(run, index, process.exitcode)
                    processes[index] = start(index)
            time.sleep(TICK)
    finally:
        for process in processes.values():
            process.terminate()
    pending.look()


def _name_killed(run: Run, index: int, status: int) -> None:
    """The case that a process had in hand when it ended becomes a failure, so that its successor passes it over."""
    number = run.parts.in_hand(index)
    what = f"signal {-status}" if status < 0 else f"status {status}"
    if number is None or run.parts.settled(run.names[number].key, run.names[number].state) is not None:
        raise UserError(f"worker {index} ended with {what} while it had no case in hand; try workers=1.")
    name = run.names[number]
    reason = f"its process ended with {what}" + (", as when memory runs out" if status == -9 else "")
    print(f"left out: case {name.case} of {name.dataset}: {reason}", file=sys.stderr)
    failure = Failure("killed", reason + ".", "Give fewer workers or more memory, and resume=true tries it again.")
    part = Part(number, name.key, name.dataset, name.case, name.state, run.parts.attempt)
    run.parts.write(replace(part, failure=failure))


def new_launch() -> str:
    """A name for processes that are started together."""
    return uuid4().hex[:8]


def shares(run: Run, count: int) -> list[list[int]]:
    """The cases of each rank."""
    return share([name.size for name in run.names], count)


def others(dealt: Sequence[Sequence[int]], rank: int) -> list[int]:
    """The cases of all ranks but `rank`."""
    return [number for index, numbers in enumerate(dealt) if index != rank for number in numbers]
