"""When damaged segments stop a run."""

import pytest

from medsam2.data.read.damage_budget import DamageBudget
from medsam2.errors import UserError


def test_the_run_stops_when_more_than_the_share_of_reads_is_damaged() -> None:
    budget = DamageBudget(0.05)
    for _ in range(5):
        budget.add(4, ["a"])  # five reads are tolerated for any share
    with pytest.raises(UserError, match=r"6 of 30 segments read are damaged \(2 different ones, the last b\).*=0.05"):
        budget.add(4, ["b"])
    assert budget.total == 6


def test_a_few_damaged_segments_among_many_are_only_counted() -> None:
    budget = DamageBudget(0.05)
    for step in range(400):
        budget.add(4, ["a"] if step % 10 == 0 else [])
    assert (budget.clips, budget.total) == (1600, 40)
