"""Helpers shared by commands: a console that stays wide in a pipe, and progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console

T = TypeVar("T")
PIPE_WIDTH = 160  # characters, without a terminal and without COLUMNS


def wide_console() -> Console:
    """Return a console for stdout, as wide as the terminal or COLUMNS, else 160 characters."""
    console = Console(soft_wrap=True)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(soft_wrap=True, width=PIPE_WIDTH)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Iterate over the items with a progress bar on stderr, which disappears at the end."""
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    hidden = not console.is_terminal
    return rich_track(items, description, total=total, console=console, transient=True, disable=hidden)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function (step, done, total) that updates a bar on stderr, if that is a terminal; total 0 is unknown.

    Text printed meanwhile goes to stdout, even if that is a pipe.
    """
    from rich import progress

    console = Console(stderr=True)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn())
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    hidden, to_terminal = not console.is_terminal, sys.stdout.isatty()
    with progress.Progress(
        *columns, *times, console=console, transient=True, disable=hidden, redirect_stdout=to_terminal
    ) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda step, done, total: bar.update(task, description=step, completed=done, total=total or None)
