"""Lanes: parts of the global batch with shards of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsam2.data.catalog import Catalog
from medsam2.data.lanes import Lanes
from medsam2.data.loader import StepDataset
from medsam2.data.plan import Plan
from medsam2.data.settings import DataSettings
from medsam2.data.stream import blocks_permutation
from medsam2.errors import UserError


def make(folder: Path, lanes: int, global_batch: int = 8, shuffle: str = "blocks") -> Plan:
    settings = DataSettings.model_validate(
        {"shards": folder, "clip_frames": 4, "lanes": lanes, "shuffle": shuffle, "shuffle_shards": 2}
    )
    return Plan([Catalog(folder)], settings, 0, global_batch)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 5))
def test_each_place_of_a_round_belongs_to_one_ordinal(lanes: int, length: int, rounds: int) -> None:
    own = Lanes(lanes, lanes)
    found = [own.place(ordinal, length) for ordinal in range(rounds * length, (rounds + 1) * length)]
    assert {found_round for found_round, _ in found} == {rounds}
    assert sorted(place for _, place in found) == list(range(length))


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 5))
def test_a_lane_takes_its_stretch_in_order(lanes: int, length: int, rounds: int) -> None:
    own = Lanes(lanes, lanes)
    edges = [*own.starts(rounds, length).tolist(), length]
    for lane in range(lanes):
        ordinals = [o for o in range(rounds * length, (rounds + 1) * length) if o % lanes == lane]
        assert [own.place(o, length)[1] for o in ordinals] == list(range(edges[lane], edges[lane + 1]))


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 200))
def test_positions_of_a_step_split_into_equal_neighbouring_parts(lanes: int, each: int, position: int) -> None:
    step, slot = divmod(position, lanes * each)
    assert Lanes(lanes, lanes * each).split(position) == (
        (slot // each, step * each + slot % each) if lanes > 1 else (0, position)
    )


def test_lanes_share_no_shard_but_at_their_borders() -> None:
    shards = np.repeat(np.arange(64), 10)
    starts = Lanes(8, 8).starts(0, len(shards))
    order = blocks_permutation(3, shards, 4, starts)
    assert sorted(order.tolist()) == list(range(len(shards)))
    parts = [set(shards[part].tolist()) for part in np.split(order, starts[1:])]
    assert [len(part) for part in parts] == [8] * 8 and len(set().union(*parts)) == 64
    for part in np.split(order, starts[1:]):  # and in each, four shards at a time
        assert len(set(shards[part[:20]].tolist())) > 2
        assert len(set(shards[part[:40]].tolist())) == 4


def test_more_lanes_than_rows_lose_nothing() -> None:
    starts = Lanes(8, 8).starts(2, 5)
    assert sorted(blocks_permutation(3, np.array([0, 0, 1, 2, 2]), 4, starts).tolist()) == list(range(5))


@pytest.mark.parametrize("shuffle", ["blocks", "full"])
def test_every_segment_is_used_before_any_repeats_with_lanes_too(shards: Path, shuffle: str) -> None:
    plan = make(shards, 4, shuffle=shuffle)
    for number, source in enumerate(plan.sources):
        stream = plan.streams["clips"]
        rows = [stream._order(number, ordinal) for ordinal in range(2 * len(source.rows))]
        assert sorted(rows) == sorted([*range(len(source.rows))] * 2)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_together_take_the_same_global_batch_with_lanes(shards: Path, ranks: int) -> None:
    expected = make(shards, 4).batch(7)
    assert tuple(e for rank in range(ranks) for e in make(shards, 4).part(7, rank, ranks)) == expected
    assert len({entry.position for entry in expected}) == len(expected) == 8


def test_one_lane_is_the_order_without_lanes_and_more_are_another(shards: Path) -> None:
    settings = DataSettings.model_validate(
        {"shards": shards, "clip_frames": 4, "shuffle": "blocks", "shuffle_shards": 2}
    )
    without = Plan([Catalog(shards)], settings, 0, 8).batch(3)
    assert make(shards, 1).batch(3) == without != make(shards, 4).batch(3)


def test_a_damaged_segment_is_replaced_by_others_with_lanes_too(shards: Path) -> None:
    plan = make(shards, 4)
    for entry in plan.batch(2):
        first = plan.substitute(entry)
        assert {first.row, plan.substitute(first).row} != {entry.row}
        assert first.position == entry.position and first.attempt == 1


def test_lanes_that_do_not_divide_the_batch_are_refused_by_the_loader(shards: Path) -> None:
    plan = make(shards, 3)
    with pytest.raises(UserError, match="data.lanes=3 does not divide the global batch of 8"):
        StepDataset(plan)
