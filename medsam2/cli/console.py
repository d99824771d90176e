"""A console whose tables are not squeezed to 80 columns when the output goes to a file or a pipe."""

from __future__ import annotations

from rich.console import Console

WIDTH = 160


def wide_console() -> Console:
    """Stdout as wide as the terminal, or 160 columns where there is none."""
    console = Console(soft_wrap=True)
    return console if console.is_terminal else Console(soft_wrap=True, width=WIDTH)
