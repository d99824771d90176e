from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsam2.data.plan.plan import Plan, validation_entries
from medsam2.data.plan.stream import PlanEntry
from medsam2.data.read.catalog import Catalog
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError


def make(folder: Path, seed: int = 0, global_batch: int = 8, **changes: Any) -> Plan:
    settings = DataSettings.model_validate({"shards": folder, "clip_frames": 4, **changes})
    return Plan([Catalog(folder)], settings, seed, global_batch)


def run(plan: Plan, count: int) -> list[PlanEntry]:
    """The first clips of the run."""
    stream = plan.streams["clips"]
    return [stream.entry(position) for position in range(count)]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_together_take_the_same_global_batch(shards: Path, ranks: int) -> None:
    expected = make(shards).batch(5)
    plans = [make(shards) for _ in range(ranks)]
    entries = [entry for rank, plan in enumerate(plans) for entry in plan.batch(5, rank, ranks)]
    assert tuple(entries) == expected


def test_the_global_batch_only_groups_positions(shards: Path) -> None:
    """Two steps of 4 (accumulation) are one of 8."""
    small = make(shards, global_batch=4)
    assert small.batch(10) + small.batch(11) == make(shards).batch(5)


def test_random_access_equals_walking_through(shards: Path) -> None:
    walked = run(make(shards), 3000)
    plan = make(shards)
    for position in (2999, 0, 1023, 1024, 7, 2048, 2047):
        assert plan.streams["clips"].entry(position) == walked[position]


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
    rows = make(shards, temperature=1.0).expected_shares(175)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert {row.source.split(":")[1]: row.segments for row in rows} == {"ct": 9, "us": 5}
    assert all(row.passes_per_epoch == pytest.approx(100, rel=0.01) for row in rows)


def test_the_mixture_may_name_modalities_and_folders(shards: Path) -> None:
    folder = shards.name
    for mixture in ({"CT": 0.5, "US": 0.5}, {f"{folder}:ct": 1, f"{folder}:*": 1}):
        assert make(shards, mixture=mixture).streams["clips"].shares.tolist() == [0.5, 0.5]


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
    first = plan.batch(0)[3]
    home = next(group for group in rows.values() if first.row in group)
    others = [plan.substitute(first)]
    while len(others) < len(home) - 1:
        others.append(plan.substitute(others[-1]))
    assert {entry.row for entry in others} <= home and first.row != others[0].row
    assert [entry.attempt for entry in others] == list(range(1, len(home)))
    assert len({entry.seed for entry in (first, *others)}) == len(home)


def test_validation_clips_are_fixed_in_order_and_thinned(shards: Path) -> None:
    settings = DataSettings(shards=(str(shards),), clip_frames=4)
    entries = validation_entries([Catalog(shards)], settings, 64)
    assert len(entries) == 6 and entries == validation_entries([Catalog(shards)], settings, 64)
    assert [entry.row for entry in entries] == sorted(entry.row for entry in entries)
    thinned = validation_entries([Catalog(shards)], settings, 3)
    assert [entry.row for entry in thinned] == sorted({entry.row for entry in entries})
    assert validation_entries([Catalog(shards)], settings.model_copy(update={"val_split": "none"}), 64) == ()


def test_two_folders_are_mixed(shards: Path, write_shards: Any, disks: Any, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", [disks(3, dataset="new")])
    settings = DataSettings(shards=(str(shards), str(other)), clip_frames=4, mixture={"other:*": 0.5, "*": 0.5})
    plan = Plan([Catalog(shards), Catalog(other)], settings, 0, 8)
    assert np.mean([entry.folder for entry in run(plan, 1024)]) == 0.5


# Choosing by size, name and modality, and what is rare


def names_drawn(plan: Plan, count: int = 200) -> Counter[str]:
    catalog = plan.catalogs[0]
    return Counter(
        catalog.names[catalog.objects(entry.row).names[index]] for entry in run(plan, count) for index in entry.objects
    )


def test_structures_are_chosen_within_a_modality_or_a_data_set(shards: Path) -> None:
    plan = make(shards, include=["CT:organ", "us:lesion"])
    for source in plan.sources:
        names = {plan.catalogs[0].names[code] for code in np.flatnonzero(source.name_weights)}
        assert names == ({"organ"} if source.dataset == "ct" else {"lesion"})


def test_structures_are_chosen_by_size(shards: Path) -> None:
    """The organ has 600 pixels on its largest frame, the lesion 80."""
    assert set(names_drawn(make(shards, peak_max=300))) == {"lesion"}
    assert set(names_drawn(make(shards, peak_min=300))) == {"organ"}


# The frame that is prompted


def test_the_prompted_frame_is_the_first_unless_asked_otherwise(shards: Path) -> None:
    assert {make(shards).prompt_frame(step) for step in range(50)} == {0}


def test_the_prompted_frame_is_anywhere_and_shows_all_objects(shards: Path) -> None:
    plan = make(shards, prompt_frame="any")
    assert {plan.prompt_frame(step) for step in range(60)} == {0, 1, 2, 3}
    for step in range(60):
        for entry in plan.batch(step):
            table = plan.catalogs[entry.folder].objects(entry.row)
            assert entry.prompt_frame == plan.prompt_frame(step)
            assert (table.pixels[list(entry.objects), entry.frames[entry.prompt_frame]] >= 16).all()
            assert plan.substitute(entry).prompt_frame == entry.prompt_frame


# Stills and clips in one run


@pytest.fixture(scope="module")
def mixed(write_shards: Any, disks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips, six stills of another modality."""
    samples = [disks(seed) for seed in range(7)]
    samples += [disks(seed, 1, dataset="xr", modality="XRAY") for seed in range(30, 36)]
    folder: Path = write_shards(tmp_path_factory.mktemp("mixed") / "mixed", samples)
    return folder


STILLS = {"share": 0.3, "clips_per_batch": 24, "max_objects": 2}


def test_stills_and_clips_have_batches_of_their_own(mixed: Path) -> None:
    plan = make(mixed, stills=STILLS)
    kinds = [plan.kind(step) for step in range(1000)]
    assert kinds.count("stills") == 300
    assert max(kinds[i : i + 10].count("stills") for i in range(900)) <= 4
    for step in range(20):
        batch = plan.batch(step)
        still = plan.kind(step) == "stills"
        assert len(batch) == (24 if still else 8)
        assert {len(entry.frames) for entry in batch} == ({1} if still else {4})
        assert {entry.row >= 7 for entry in batch} == {still}
        assert all(len(entry.objects) <= (2 if still else 3) for entry in batch)


def test_clips_are_numbered_through_whatever_stands_between(mixed: Path) -> None:
    """The order of clips does not depend on how many stills are mixed in, but on which clip of the run it is."""
    plan = make(mixed, stills=STILLS)
    clips = [entry for step in range(40) if plan.kind(step) == "clips" for entry in plan.batch(step)]
    assert [entry.position for entry in clips] == list(range(len(clips)))
    stills = [entry for step in range(40) if plan.kind(step) == "stills" for entry in plan.batch(step)]
    assert [entry.position for entry in stills] == list(range(len(stills)))
    assert len({entry.seed for entry in clips + stills}) == len(clips) + len(stills)


def test_stills_can_be_cut_out_of_clips(mixed: Path) -> None:
    plan = make(mixed, stills={**STILLS, "from_clips": True})
    rows = {entry.row for step in range(40) if plan.kind(step) == "stills" for entry in plan.batch(step)}
    assert rows == set(range(13))


def test_shares_of_stills_and_clips_add_up(mixed: Path) -> None:
    rows = make(mixed, stills=STILLS).expected_shares(100)
    assert {(row.kind, row.modality): row.passes_per_epoch * row.segments for row in rows} == {
        ("clips", "CT"): pytest.approx(70 * 8),
        ("stills", "XRAY"): pytest.approx(30 * 24),
    }
    assert sum(row.share for row in rows) == pytest.approx(1.0)


def test_without_a_share_stills_are_clips_of_one_frame_again_and_again(mixed: Path) -> None:
    entries = [entry for step in range(10) for entry in make(mixed).batch(step)]
    assert {entry.frames for entry in entries if entry.row >= 7} == {(0, 0, 0, 0)}


@pytest.mark.parametrize(
    ("folder", "stills", "words"),
    [("shards", {"share": 0.5}, "from_clips=true"), ("still", {"share": 0.5}, "clip_frames=1")],
)
def test_a_mix_that_cannot_be_says_what_to_change(
    shards: Path, write_shards: Any, disks: Any, tmp_path: Path, folder: str, stills: dict[str, Any], words: str
) -> None:
    path = shards if folder == "shards" else write_shards(tmp_path / "still", [disks(1, 1)])
    with pytest.raises(UserError, match=words):
        make(path, stills=stills)


def test_the_mixture_counts_over_stills_and_clips(mixed: Path) -> None:
    make(mixed, stills=STILLS, mixture={"XRAY": 1, "CT": 1})
    with pytest.raises(UserError, match="'MR' matches none"):
        make(mixed, stills=STILLS, mixture={"XRAY": 1, "CT": 1, "MR": 1})
