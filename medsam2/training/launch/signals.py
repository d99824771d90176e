"""SIGINT, SIGTERM and SIGUSR1 set a flag, nothing more; the run reads it once a step.

Lightning's own handler talks to the other ranks from inside the handler, which hangs when a signal reaches one rank
alone, and knows SIGUSR1 under SLURM only. This file imports no torch: the handlers are installed before that is loaded.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# What was heard; the largest one counts where ranks heard different things.
NONE, INTERRUPT, TERMINATE, WARNED = 0, 1, 2, 3
LEVELS = {signal.SIGINT: INTERRUPT, signal.SIGTERM: TERMINATE, signal.SIGUSR1: WARNED}
NAMES = {level: number.name for number, level in LEVELS.items()}

_heard = NONE


def heard() -> int:
    """The strongest signal that this process has got: one of the levels above."""
    return _heard


def exit_status(level: int) -> int:
    """The status of a run that was stopped and is not requeued: 130 after Ctrl-C, else 143."""
    return 128 + (signal.SIGINT if level == INTERRUPT else signal.SIGTERM)


def _hear(number: int, frame: FrameType | None) -> None:
    global _heard
    if number == signal.SIGINT:  # of a person, whose second Ctrl-C does not wait for anything
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"\nThe run is saved after this step and ends; Ctrl-C again ends it at once, unsaved.\n")
    _heard = max(_heard, LEVELS[signal.Signals(number)])


def listen() -> None:
    """Install the handlers (from the main thread; elsewhere Python has no signals)."""
    if threading.current_thread() is threading.main_thread():
        for number in LEVELS:
            signal.signal(number, _hear)


@contextmanager
def listening() -> Iterator[None]:
    """Listen for as long as a run lasts. What was heard before it counts; afterwards all is as it was."""
    global _heard
    before = {number: signal.getsignal(number) for number in LEVELS}
    listen()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if _hear not in before.values():
            _heard = NONE


def shield_worker(*_: Any) -> None:
    """In a process that loads data: a signal that a scheduler sends to all processes of a job is not meant for it.

    The signals are blocked and read by a thread that obeys the parent alone (torch ends a worker by SIGTERM), since
    a worker that dies takes the run with it before that can save.
    """
    parent, numbers = os.getppid(), set(LEVELS)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def wait() -> None:
        while True:
            if signal.sigwaitinfo(numbers).si_pid in (parent, os.getpid()):
                os._exit(0)

    threading.Thread(target=wait, daemon=True, name="signals").start()
