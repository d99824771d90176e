"""Join staged cases to shards and write the index last; for a URL, upload the files in the same order."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medsam2.files import atomic_write, file_sha256
from medsam2.shards.index import INDEX_FILE, SUMMARY_FILE, write_index
from medsam2.shards.prepare.folder import SOURCES, Output, SourceState
from medsam2.shards.prepare.pseudonyms import slug
from medsam2.shards.prepare.stage import StagedCase, part_path
from medsam2.shards.tar import END_MARK

NUM_WRITERS = 4
SHARD_NAME = re.compile(r"(?P<group>.+-\w+)-(?P<number>\d{6,})\.tar")
PARTIAL_NAME = re.compile(r"\.(.+\.tar|.+\.json|index\.arrow|failures\.jsonl)\.\d+\.partial")
"""The partial files of a killed `atomic_write`."""

Row = dict[str, Any]
ShardPlan = Mapping[str, Sequence[StagedCase]]
"""The cases of each shard in order, by the name of the shard."""
Progress = Callable[[int, int], None]
"""Called with (number of finished shards, number of shards)."""


@dataclass(frozen=True)
class WrittenShard:
    """Size and sha256 of a shard, for `index.json`; `unchanged` if an earlier run had written the same bytes."""

    bytes: int
    sha256: str
    unchanged: bool


def plan_shards(staged: Sequence[StagedCase], max_bytes: int) -> ShardPlan:
    """Sort cases by content and pack them into shards of at most `max_bytes`; a larger case gets its own shard.

    Training and validation take cases in the order of the index, which is therefore the same under every salt.
    """
    groups: dict[str, list[StagedCase]] = defaultdict(list)
    for result in sorted(staged, key=_sort_key):
        groups[f"{slug(result.job.ref.dataset)}-{result.job.split}"].append(result)
    return {
        f"{group}-{number:06d}.tar": batch
        for group in sorted(groups)
        for number, batch in enumerate(_batches(groups[group], max_bytes))
    }


def _sort_key(staged: StagedCase) -> tuple[str, str, str]:
    """Sort key of a case: the hash of its labels, then of its voxels, then its name.

    Labels come first because they are exact: processors and video decoders round images differently, and one different
    voxel would change the order. A hash of the name would let a reader test guesses of names.
    """
    labels = json.dumps([row["objects"] for row in staged.rows])
    return hashlib.sha256(labels.encode()).hexdigest(), staged.rows[0]["content_hash"], staged.job.name


def _batches(results: Sequence[StagedCase], max_bytes: int) -> Iterator[list[StagedCase]]:
    batch: list[StagedCase] = []
    size = 0
    for result in results:
        if batch and size + result.size > max_bytes:
            yield batch
            batch, size = [], 0
        batch.append(result)
        size += result.size
    if batch:
        yield batch


def write_shards(plan: ShardPlan, output: Output, progress: Progress) -> dict[str, WrittenShard]:
    """Delete shards and partial files of an interrupted run that are not in `plan`, then write the shards."""
    for path in output.folder.iterdir():
        if PARTIAL_NAME.fullmatch(path.name) or (SHARD_NAME.fullmatch(path.name) and path.name not in plan):
            path.unlink()
    shards = {}
    with ThreadPoolExecutor(NUM_WRITERS) as pool:  # hashing and writing release the GIL
        written = pool.map(lambda name: _write_shard(output.folder / name, plan[name], output.staging), plan)
        for done, (name, shard) in enumerate(zip(plan, written, strict=True)):
            progress(done, len(plan))
            shards[name] = shard
    progress(len(plan), len(plan))
    return shards


def _write_shard(path: Path, cases: Sequence[StagedCase], staging: Path) -> WrittenShard:
    before = file_sha256(path) if path.is_file() else ""
    with atomic_write(path) as file:
        for case in cases:
            with open(part_path(staging, case.job), "rb") as part:
                shutil.copyfileobj(part, file)
        file.write(END_MARK)
    sha256 = file_sha256(path)
    return WrittenShard(path.stat().st_size, sha256, unchanged=sha256 == before)


def index_rows(plan: ShardPlan) -> list[Row]:
    """The rows of the index: those of the staged cases, with offsets within their shards."""
    rows = []
    for shard, cases in plan.items():
        offset = 0
        for case in cases:
            for row in case.rows:
                offsets = {name: [n + offset for n in row[name]] for name in ("frame_offset", "mask_offset")}
                rows.append({**row, **offsets, "json_offset": row["json_offset"] + offset, "shard": shard})
            offset += case.size
    return rows


def publish(
    output: Output,
    rows: Sequence[Row],
    summary: dict[str, Any],
    sources: Mapping[str, SourceState],
    shards: Mapping[str, WrittenShard],
    progress: Progress,
) -> None:
    """Write `sources.json`, `index.json` and, last, `index.arrow`; for a URL, upload shards and index in this order."""
    with atomic_write(output.folder / SOURCES, "w") as file:
        json.dump({case: asdict(state) for case, state in sources.items()}, file, indent=0, sort_keys=True)
    write_index(output.folder, rows, summary)
    if output.url:
        sizes = output.url.sizes()
        for name in sizes:
            if SHARD_NAME.fullmatch(name) and name not in shards:
                output.url.delete(name)
        for done, (name, shard) in enumerate(shards.items()):
            progress(done, len(shards))
            if not shard.unchanged or sizes.get(name) != shard.bytes:
                output.url.put(output.folder / name)
        for name in (SOURCES, SUMMARY_FILE, INDEX_FILE):
            output.url.put(output.folder / name)
