"""The table of the mixture at the start of a run."""

from __future__ import annotations

from medsam2.data.plan.plan import ShareRow
from medsam2.training.fit import shares_table


def test_shares_are_stated_by_dataset() -> None:
    rows = [
        ShareRow("clips", "s:abdomen", "CT", 10, 40, 0.5, 10.0),
        ShareRow("clips", "s:lung", "CT", 5, 10, 0.2, 16.0),
        ShareRow("stills", "s:chest", "XRAY", 90, 90, 0.3, 2.7),
    ]
    lines = {line[0]: line[1:] for line in shares_table(rows).lines}
    assert lines["s:abdomen"] == ["CT", "clips", "10", "40", "50.0%", "10"]
    assert lines["s:chest"] == ["XRAY", "stills", "90", "90", "30.0%", "2.7"]
