"""Two people who prepare the same data have the same split, shards, subsets and plan, whatever their salts are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from medsam2.data.plan.plan import Plan, validation_entries
from medsam2.data.plan.sources import find_sources
from medsam2.data.read.catalog import Catalog
from medsam2.data.settings import DataSettings
from medsam2.evaluation.run.sources import list_cases, load_cases
from medsam2.shards.index import IndexRow, read_index
from medsam2.shards.prepare.run import PrepareOptions, prepare

SALTS = ("salt of one clinic", "salt of another", "a third")
NAMES = ("key", "case", "patient", "dataset", "shard")


@pytest.fixture(scope="module")
def prepared(raw_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """`raw_folder` prepared under each salt, each time from a copy at another place, the last with other names."""
    folders = []
    with pytest.MonkeyPatch.context() as patch:
        for salt in SALTS:
            patch.setenv("MEDSAM2_SALT", salt)
            raw, out = (tmp_path_factory.mktemp("place") / name for name in ("raw", "shards"))
            shutil.copytree(raw_folder, raw)
            if salt == SALTS[-1]:
                (raw / "deep").rename(raw / "videos")
                (raw / "Dataset001_Test").rename(raw / "Dataset002_Test")
            prepare(raw, out, PrepareOptions(shares={"train": 0.5, "val": 0.5}, shard_bytes=100_000))
            folders.append(out)
    return tuple(folders)


def segments(folder: Path) -> list[IndexRow]:
    index = read_index(folder)
    return [index.row(number) for number in range(len(index))]


def without_names(row: IndexRow) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if name not in NAMES}


def test_split_and_order_of_contents_in_the_shards_are_the_same(prepared: tuple[Path, ...]) -> None:
    first, *others = map(segments, prepared)
    assert len({row.content_hash for row in first}) > 8 and len({row.shard for row in first}) > 6
    for other in others:
        assert not {row.case for row in first} & {row.case for row in other}
        assert [*map(without_names, other)] == [*map(without_names, first)]


@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit_takes_the_same_cases(prepared: tuple[Path, ...], limit: int) -> None:
    def contents(folder: Path) -> list[str]:
        cases = list_cases(folder, limit=limit)
        return [cases.load(number).content_hash for number in range(cases.count)]

    first, *others = map(contents, prepared)
    assert len(first) > limit and all(other == first for other in others)
    for folder in prepared:
        assert [case.content_hash for case in load_cases(folder, "val", limit)] == first


def test_the_plan_and_the_validation_take_the_same_clips(prepared: tuple[Path, ...]) -> None:
    def clips(folder: Path) -> list[Any]:
        catalogs = (Catalog(folder),)
        settings = DataSettings(shards=(str(folder),), min_pixels=1)
        plan = Plan(catalogs, settings, seed=3, global_batch=4)
        entries = [
            *(entry for step in range(8) for entry in plan.batch(step)),
            *validation_entries(catalogs, settings, 3),
        ]
        return [(entry, catalogs[0].text("content_hash", entry.row)) for entry in entries]

    first, *others = map(clips, prepared)
    assert all(other == first for other in others)


def test_few_cases_for_training_are_the_same(prepared: tuple[Path, ...]) -> None:
    def contents(folder: Path) -> list[list[str]]:
        catalog = Catalog(folder)
        settings = DataSettings(shards=(str(folder),), min_pixels=1, limit_cases=1)
        return [catalog.distinct("content_hash", source.rows) for source in find_sources((catalog,), settings, "train")]

    first, *others = map(contents, prepared)
    assert all(len(of_source) == 1 for of_source in first)
    assert all(other == first for other in others)
