"""Batches over a URL are those of the local folder, one by one, whatever the cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from http_shards import HttpShards
from small_shards import build
from torch.utils.data import DataLoader

from medsam2.data import cache
from medsam2.data.batch import ClipBatch
from medsam2.data.cache_settings import CacheSettings
from medsam2.data.catalog import Catalog
from medsam2.data.loader import StepDataset
from medsam2.data.plan import Plan
from medsam2.data.settings import DataSettings
from medsam2.data.store import open_store


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Six small shards."""
    return build(tmp_path / "local")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CacheSettings:
    monkeypatch.setattr(cache, "GRACE", 0.005)
    return CacheSettings(folder=tmp_path / "cache")


def _batches(where: str, cache: CacheSettings, steps: int = 6, workers: int = 0, **more: Any) -> list[ClipBatch]:
    more = {"shuffle": "full", **more}
    settings = DataSettings(shards=(where,), clip_frames=3, clips_per_batch=4, cache=cache, **more)
    plan = Plan((Catalog(open_store(where, cache)),), settings, seed=3, global_batch=4)
    return list(DataLoader(StepDataset(plan), batch_size=None, sampler=range(steps), num_workers=workers))


def _assert_same(found: Sequence[ClipBatch], expected: Sequence[ClipBatch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.keys, one.names, one.lost) == (other.keys, other.names, ())
        for name in ("frames", "masks", "sizes", "object_to_clip", "seeds"):
            np.testing.assert_array_equal(getattr(one, name).numpy(), getattr(other, name).numpy(), err_msg=name)


def test_batches_over_http_are_those_of_the_local_folder(shards: Path, settings: CacheSettings):
    with HttpShards(shards) as server:
        _assert_same(_batches(server.url, settings), _batches(str(shards), settings))
        assert server.gets["demo-train-000000.tar"] == 1


def test_batches_out_of_memory_are_those_of_the_local_folder(local: Path, settings: CacheSettings):
    filesystem, folder = fsspec.filesystem("memory"), f"/{uuid4()}"
    filesystem.put(f"{local}/", f"{folder}/", recursive=True)
    expected = _batches(str(local), settings)
    for workers in (0, 1):
        _assert_same(_batches(f"memory:/{folder}", settings, workers=workers), expected)
    filesystem.rm(folder, recursive=True)


def test_workers_with_a_cache_that_holds_two_of_six_shards_read_the_same_batches(local: Path, settings: CacheSettings):
    limit = 2 * max(path.stat().st_size for path in local.glob("*.tar"))
    small = settings.model_copy(update={"size_gb": limit / 1e9, "ahead": 3})
    with HttpShards(local) as server:
        _assert_same(_batches(server.url, small, 20, workers=2), _batches(str(local), settings, 20))
        assert max(server.gets[path.name] for path in local.glob("*.tar")) > 1
    assert small.folder is not None
    assert 0 < sum(path.stat().st_size for path in small.folder.glob("*/*.tar")) <= limit


@pytest.mark.parametrize("shuffle", ["auto", "full", "blocks"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_by_range_are_those_of_the_local_folder(
    shuffle: str, workers: int, local: Path, settings: CacheSettings
):
    """With `auto` too, since no shard has to be fetched whole; and no shard comes to the disk."""
    by_range = settings.model_copy(update={"mode": "ranges"})
    with HttpShards(local) as server:
        found = _batches(server.url, by_range, 20, workers, shuffle=shuffle, shuffle_shards=2)
        assert sum(server.gets[path.name] for path in local.glob("*.tar")) <= 20 * 4, "at most one request a clip"
    _assert_same(found, _batches(str(local), settings, 20, shuffle=shuffle, shuffle_shards=2))
    assert settings.folder is not None and not list(settings.folder.glob("*/*.tar"))


def test_ranges_and_local_folders_are_mixed_in_one_batch(local: Path, shards: Path, settings: CacheSettings):
    """Colour, grey, strides and reflections: everything that the generated shards have."""
    by_range = settings.model_copy(update={"mode": "ranges"})
    filesystem, folder = fsspec.filesystem("memory"), f"/{uuid4()}"
    filesystem.put(f"{local}/", f"{folder}/", recursive=True)
    with HttpShards(shards) as server:
        batches = []
        for places in ((server.url, f"memory:/{folder}", str(local)), (str(shards), str(local), str(local))):
            own = DataSettings(shards=places, clip_frames=8, clips_per_batch=8, cache=by_range, stride_max=3)
            plan = Plan([Catalog(open_store(where, by_range)) for where in places], own, seed=3, global_batch=8)
            batches.append([StepDataset(plan)[step] for step in range(10)])
    _assert_same(*batches)
    filesystem.rm(folder, recursive=True)
