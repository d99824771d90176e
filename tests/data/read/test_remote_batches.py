"""Batches over a URL are those of the local folder, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from http_shards import HttpShards
from torch.utils.data import DataLoader

from medsam2.data.batch import ClipBatch
from medsam2.data.plan.plan import Plan
from medsam2.data.read.catalog import Catalog
from medsam2.data.read.reader import StepDataset
from medsam2.data.read.store import open_store
from medsam2.data.settings import DataSettings


def _batches(*locations: str, steps: int = 10, workers: int = 0) -> list[ClipBatch]:
    settings = DataSettings(shards=locations, clip_frames=4, clips_per_batch=4, stride_max=3)
    plan = Plan([Catalog(open_store(location)) for location in locations], settings, seed=3, global_batch=4)
    return list(DataLoader(StepDataset(plan), batch_size=None, sampler=range(steps), num_workers=workers))


def _assert_same(batches: Sequence[ClipBatch], expected: Sequence[ClipBatch]) -> None:
    for one, other in zip(batches, expected, strict=True):
        assert (one.keys, one.names, one.damaged_keys) == (other.keys, other.names, ())
        for name in ("frames", "masks", "sizes", "object_to_clip", "seeds"):
            np.testing.assert_array_equal(getattr(one, name).numpy(), getattr(other, name).numpy(), err_msg=name)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_http_are_those_of_the_local_folder(workers: int, server: HttpShards, local: Path) -> None:
    batches = _batches(server.url, workers=workers)
    assert sum(server.gets[path.name] for path in local.glob("*.tar")) <= 10 * 4, "at most one request a clip"
    _assert_same(batches, _batches(str(local)))


def test_urls_and_local_folders_are_mixed_in_one_batch(local: Path, shards: Path) -> None:
    """Colour, grey, strides and reflections: everything that the generated shards have."""
    filesystem, folder = fsspec.filesystem("memory"), f"/{uuid4()}"
    filesystem.put(f"{local}/", f"{folder}/", recursive=True)
    with HttpShards(shards) as server:
        batches = _batches(server.url, f"memory:/{folder}", str(local))
    _assert_same(batches, _batches(str(shards), str(local), str(local)))
    filesystem.rm(folder, recursive=True)
