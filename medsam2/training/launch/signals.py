"""Handle SIGINT, SIGTERM and SIGUSR1: a handler only sets a flag, which the run reads once per step.

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

# Levels of a stop. The largest one counts where ranks received different signals.
NONE, INTERRUPT, TERMINATE, WARNED = 0, 1, 2, 3
LEVELS = {signal.SIGINT: INTERRUPT, signal.SIGTERM: TERMINATE, signal.SIGUSR1: WARNED}
NAMES = {level: number.name for number, level in LEVELS.items()}

_received = NONE


def received_signal() -> int:
    """Return the level of the strongest signal that this process has received."""
    return _received


def exit_status(level: int) -> int:
    """The status of a run that was stopped and is not requeued: 130 after Ctrl-C, else 143."""
    return 128 + (signal.SIGINT if level == INTERRUPT else signal.SIGTERM)


def _record(number: int, frame: FrameType | None) -> None:
    global _received
    if number == signal.SIGINT:  # a second Ctrl-C ends the process at once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"\nThe run is saved after this step and ends; Ctrl-C again ends it at once, unsaved.\n")
    _received = max(_received, LEVELS[signal.Signals(number)])


def install_handlers() -> None:
    """Install the handlers (from the main thread; elsewhere Python has no signals)."""
    if threading.current_thread() is threading.main_thread():
        for number in LEVELS:
            signal.signal(number, _record)


@contextmanager
def signals_handled() -> Iterator[None]:
    """Handle signals while a run lasts, and restore the earlier handlers. A signal from before the run counts."""
    global _received
    before = {number: signal.getsignal(number) for number in LEVELS}
    install_handlers()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if _record not in before.values():
            _received = NONE


def shield_worker(*_: Any) -> None:
    """Make a data worker ignore the signals that a scheduler sends to all processes of a job.

    A worker that dies would end the run before it can save. So the signals are blocked, and a thread reads them, which
    obeys the parent alone (torch ends a worker by SIGTERM).
    """
    parent, numbers = os.getppid(), set(LEVELS)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def wait() -> None:
        while True:
            if signal.sigwaitinfo(numbers).si_pid in (parent, os.getpid()):
                os._exit(0)

    threading.Thread(target=wait, daemon=True, name="signals").start()
