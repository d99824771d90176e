"""The table of the mixture at the start of a run."""

from __future__ import annotations

from rich.console import Console

from medsam2.data.plan import ShareRow
from medsam2.training.fit import shares_table


def printed(rows: list[ShareRow]) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(shares_table(rows))
    return capture.get()


def test_shares_are_stated_by_dataset() -> None:
    rows = [
        ShareRow("clips", "s:abdomen", "CT", 10, 40, 0.5, 400.0, 10.0),
        ShareRow("clips", "s:lung", "CT", 5, 10, 0.2, 160.0, 16.0),
        ShareRow("stills", "s:chest", "XRAY", 90, 90, 0.3, 240.0, 2.7),
    ]
    text = printed(rows)
    lines = {line.split()[1]: line.split() for line in text.splitlines() if line.startswith("│")}
    assert lines["s:abdomen"][3:-1] == ["CT", "│", "clips", "│", "10", "│", "40", "│", "50.0%", "│", "10"]
    assert lines["s:chest"][3:-1] == ["XRAY", "│", "stills", "│", "90", "│", "90", "│", "30.0%", "│", "2.7"]
