"""Staged cases -> shards -> index, each file whole or absent, the index last; then all to a URL in that order."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from medsam2.files import atomic_write, file_sha256
from medsam2.shards.index import ARROW, JSON, write_index
from medsam2.shards.prepare.folder import SOURCES, Output, SourceState
from medsam2.shards.prepare.pseudonyms import slug
from medsam2.shards.prepare.stage import Staged, part_path
from medsam2.shards.tar import END

BLOCK_BYTES = 1 << 20
NUM_WRITERS = 4
SHARD = re.compile(r"(?P<group>.+-\w+)-(?P<number>\d{6,})\.tar")
PARTIAL = re.compile(r"\.(.+\.tar|.+\.json|index\.arrow|failures\.jsonl)\.\d+\.partial")
"""What `atomic_write` leaves of a file of ours when it is killed."""

Row = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with (shards that are done, number of shards)."""


@dataclass(frozen=True)
class ShardPlan:
    """The name of a shard and the cases in it, in order."""

    name: str
    members: tuple[Staged, ...]


@dataclass(frozen=True)
class WrittenShard:
    """A shard as `index.json` states it; `unchanged` if an earlier run had written the same bytes."""

    bytes: int
    sha256: str
    unchanged: bool


def plan_shards(staged: Sequence[Staged], limit: int) -> list[ShardPlan]:
    """Cases in the order of their content, in shards of at most `limit` bytes (a larger case has a shard of its own).

    The plan, limits and the validation take cases in the order of the index: they are the same under every salt.
    """
    groups: dict[str, list[Staged]] = defaultdict(list)
    for result in sorted(staged, key=_content):
        groups[f"{slug(result.job.ref.dataset)}-{result.job.split}"].append(result)
    return [
        ShardPlan(f"{group}-{number:06d}.tar", tuple(members))
        for group in sorted(groups)
        for number, members in enumerate(_batches(groups[group], limit))
    ]


def _content(staged: Staged) -> tuple[str, str, str]:
    """What a case is ordered by: hashes of its labels and of its voxels, and the name only of what is equal in both.

    Labels come first because they are exact. Processors and video decoders round images in different ways, and a
    single voxel would send a case to another place. A hash of the name would let a reader check guesses of names.
    """
    labels = json.dumps([row["objects"] for row in staged.rows])
    return hashlib.sha256(labels.encode()).hexdigest(), staged.rows[0]["content_hash"], staged.job.name


def _batches(results: Sequence[Staged], limit: int) -> Iterator[list[Staged]]:
    batch: list[Staged] = []
    size = 0
    for result in results:
        if batch and size + result.size > limit:
            yield batch
            batch, size = [], 0
        batch.append(result)
        size += result.size
    if batch:
        yield batch


def write_shards(plans: Sequence[ShardPlan], output: Output, progress: Progress) -> dict[str, WrittenShard]:
    """Write the shards, after what an interrupted run left that no longer belongs to them was deleted."""
    names = {plan.name for plan in plans}
    for path in output.folder.iterdir():
        if PARTIAL.fullmatch(path.name) or (SHARD.fullmatch(path.name) and path.name not in names):
            path.unlink()
    shards = {}
    with ThreadPoolExecutor(NUM_WRITERS) as pool:  # hashing and writing release the interpreter lock
        written = pool.map(lambda plan: _write_shard(plan, output), plans)
        for done, (plan, shard) in enumerate(zip(plans, written, strict=True)):
            progress(done, len(plans))
            shards[plan.name] = shard
    progress(len(plans), len(plans))
    return shards


def _write_shard(plan: ShardPlan, output: Output) -> WrittenShard:
    path = output.folder / plan.name
    size = sum(member.size for member in plan.members) + len(END)
    if path.is_file():
        before = file_sha256(path)
        if before == _join(plan, output.staging, None):
            return WrittenShard(size, before, unchanged=True)
    with atomic_write(path) as file:
        return WrittenShard(size, _join(plan, output.staging, file), unchanged=False)


def _join(plan: ShardPlan, staging: Path, file: IO[bytes] | None) -> str:
    """Write the shard's bytes to `file`, where there is one, and return their sha256."""
    digest = hashlib.sha256()
    for member in plan.members:
        with open(part_path(staging, member.job), "rb") as part:
            while block := part.read(BLOCK_BYTES):
                digest.update(block)
                if file:
                    file.write(block)
    digest.update(END)
    if file:
        file.write(END)
    return digest.hexdigest()


def index_rows(plans: Sequence[ShardPlan]) -> list[Row]:
    """The rows of the index: those of the staged cases, with offsets inside of their shards."""
    rows = []
    for plan in plans:
        offset = 0
        for member in plan.members:
            for row in member.rows:
                lists = {name: [at + offset for at in row[name]] for name in ("frame_offset", "mask_offset")}
                rows.append({**row, **lists, "json_offset": row["json_offset"] + offset, "shard": plan.name})
            offset += member.size
    return rows


def publish(
    output: Output,
    rows: Sequence[Row],
    summary: dict[str, Any],
    sources: Mapping[str, SourceState],
    shards: Mapping[str, WrittenShard],
    progress: Progress,
) -> None:
    """Write `sources.json`, `index.json` and, last, `index.arrow`; of a URL send shards and index in this order."""
    with atomic_write(output.folder / SOURCES, "w") as file:
        json.dump({case: asdict(state) for case, state in sources.items()}, file, indent=0, sort_keys=True)
    write_index(output.folder, rows, summary)
    if output.url:
        sizes = output.url.sizes()
        for name in sizes:
            if SHARD.fullmatch(name) and name not in shards:
                output.url.delete(name)
        for done, (name, shard) in enumerate(shards.items()):
            progress(done, len(shards))
            if not shard.unchanged or sizes.get(name) != shard.bytes:
                output.url.put(output.folder / name)
        for name in (SOURCES, JSON, ARROW):
            output.url.put(output.folder / name)
