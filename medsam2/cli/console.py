"""What commands share: a console that does not squeeze its tables into a pipe, and progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console

T = TypeVar("T")
PIPE_WIDTH = 160  # characters, where no terminal and no COLUMNS says how wide lines may be


def wide_console() -> Console:
    """Stdout as wide as the terminal or COLUMNS say, or 160 columns where neither does."""
    console = Console(soft_wrap=True)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(soft_wrap=True, width=PIPE_WIDTH)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar on stderr that is gone when it is done."""
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    hidden = not console.is_terminal
    return rich_track(items, description, total=total, console=console, transient=True, disable=hidden)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function (step, done, total) that moves a bar on stderr, where that is a terminal; a total of 0 is not known.

    What is printed meanwhile goes to stdout, wherever that leads.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),
    ) as bar:  # fmt: skip
        task = bar.add_task("starting", total=None)
        yield lambda step, done, total: bar.update(task, description=step, completed=done, total=total or None)
