"""What commands share on the terminal: a console that does not squeeze its tables into a pipe, and a progress bar."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
