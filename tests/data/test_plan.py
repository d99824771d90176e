from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsam2.data.catalog import Catalog
from medsam2.data.plan import Plan, PlanEntry, validation_entries
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError


def make(folder: Path, seed: int = 0, global_batch: int = 8, **changes: Any) -> Plan:
    settings = DataSettings.model_validate({"shards": folder, "clip_frames": 4, **changes})
    return Plan([Catalog(folder)], settings, seed, global_batch)


def run(plan: Plan, count: int) -> list[PlanEntry]:
    return [plan.entry(position) for position in range(count)]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_together_take_the_same_global_batch(shards: Path, ranks: int) -> None:
    expected = make(shards).batch(5)
    local = 8 // ranks
    plans = [make(shards) for _ in range(ranks)]
    taken = [entry for rank, plan in enumerate(plans) for entry in plan.slice(5, rank * local, local)]
    assert tuple(taken) == expected


def test_the_global_batch_only_groups_positions(shards: Path) -> None:
    """Two steps of 4 (accumulation) are one of 8."""
    small = make(shards, global_batch=4)
    assert small.batch(10) + small.batch(11) == make(shards).batch(5)


def test_random_access_equals_walking_through(shards: Path) -> None:
    walked = run(make(shards), 3000)
    plan = make(shards)
    for position in (2999, 0, 1023, 1024, 7, 2048, 2047):
        assert plan.entry(position) == walked[position]


def test_a_pickled_plan_gives_the_same_entries(shards: Path) -> None:
    plan = make(shards)
    assert pickle.loads(pickle.dumps(plan)).batch(700) == plan.batch(700)


def test_every_segment_is_used_before_any_repeats(shards: Path) -> None:
    plan = make(shards)
    entries = run(plan, 2500)
    for source in plan.sources:
        rows = [entry.row for entry in entries if entry.row in set(source.rows.tolist())]
        size = len(source.rows)
        for start in range(0, len(rows) - size, size):
            assert sorted(rows[start : start + size]) == source.rows.tolist()


def test_another_pass_has_another_order_and_another_seed_too(shards: Path) -> None:
    plan = make(shards, mixture={"ct": 1, "us": 0})
    rows = [entry.row for entry in run(plan, 18)]
    assert rows[:9] != rows[9:]
    assert rows != [entry.row for entry in run(make(shards, seed=1, mixture={"ct": 1, "us": 0}), 18)]


def test_seeds_are_all_different(shards: Path) -> None:
    assert len({entry.seed for entry in run(make(shards), 2000)}) == 2000


def test_objects_are_present_on_the_first_frame(shards: Path) -> None:
    plan = make(shards)
    for entry in run(plan, 400):
        table = plan.catalogs[entry.folder].objects(entry.row)
        assert entry.objects and len(set(entry.objects)) == len(entry.objects) <= 3
        assert (table.pixels[list(entry.objects), entry.frames[0]] >= plan.settings.min_pixels).all()


def test_each_batch_is_close_to_the_mixture(shards: Path) -> None:
    plan = make(shards, mixture={"us": 0.25, "*": 0.75})
    us = {int(row) for source in plan.sources if source.dataset == "us" for row in source.rows}
    counts = [sum(entry.row in us for entry in plan.batch(step)) for step in range(256)]
    assert sum(counts) == 256 * 2
    assert min(counts) >= 0 and max(counts) <= 4


def test_shares_add_up_and_say_how_often_a_segment_is_seen(shards: Path) -> None:
    rows = make(shards, temperature=1.0).expected_shares(1400)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert {row.source.split(":")[1]: row.segments for row in rows} == {"ct": 9, "us": 5}
    assert all(row.passes_per_epoch == pytest.approx(100, rel=0.01) for row in rows)


def test_the_mixture_may_name_modalities_and_folders(shards: Path) -> None:
    folder = shards.name
    for mixture in ({"CT": 0.5, "US": 0.5}, {f"{folder}:ct": 1, f"{folder}:*": 1}):
        assert make(shards, mixture=mixture).shares.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "trian"}, "Did you mean 'train'"),
        ({"include": ["lesoin"]}, "Did you mean 'lesion'"),
        ({"modalities": ["MR"]}, "data.modalities"),
        ({"min_pixels": 10**6}, "data.min_pixels"),
        ({"mixture": {"ct": 1}}, "leaves out demo:us"),
        ({"mixture": {"*": 1, "cta": 1}}, "'cta' matches none"),
        ({"mixture": {"*": 0}}, "positive share"),
    ],
)
def test_a_plan_without_clips_says_why(shards: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(shards, **changes)


def test_structures_are_left_out_by_name(shards: Path) -> None:
    for changes in ({"include": ["les*"]}, {"exclude": ["organ"]}):
        plan = make(shards, **changes)
        names = Counter(
            plan.catalogs[0].names[plan.catalogs[0].objects(entry.row).names[index]]
            for entry in run(plan, 100)
            for index in entry.objects
        )
        assert set(names) == {"lesion"}


def test_cases_can_be_limited(shards: Path) -> None:
    plan = make(shards, limit_cases=2)
    assert [source.cases for source in plan.sources] == [2, 2]


def test_attempts_give_the_next_segments_of_the_same_data_set(shards: Path) -> None:
    plan = make(shards)
    rows = {name: set(s.rows.tolist()) for s in plan.sources for name in [s.dataset]}
    first = plan.entry(3)
    home = next(group for group in rows.values() if first.row in group)
    others = [plan.entry(3, attempt).row for attempt in range(1, len(home))]
    assert set(others) <= home and first.row not in others[:1]


def test_validation_clips_are_fixed_in_order_and_thinned(shards: Path) -> None:
    settings = DataSettings(shards=shards, clip_frames=4)
    entries = validation_entries([Catalog(shards)], settings)
    assert len(entries) == 6 and entries == validation_entries([Catalog(shards)], settings)
    assert [entry.row for entry in entries] == sorted(entry.row for entry in entries)
    thinned = validation_entries([Catalog(shards)], settings.model_copy(update={"limit_val": 3}))
    assert [entry.row for entry in thinned] == sorted({entry.row for entry in entries})
    assert validation_entries([Catalog(shards)], settings.model_copy(update={"val_split": "none"})) == ()


def test_two_folders_are_mixed(shards: Path, write_shards: Any, disks: Any, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", [disks(3, dataset="new")])
    settings = DataSettings(shards=(shards, other), clip_frames=4, mixture={"other:*": 0.5, "*": 0.5})
    plan = Plan([Catalog(shards), Catalog(other)], settings, 0, 8)
    assert np.mean([entry.folder for entry in run(plan, 1024)]) == 0.5
