"""Staged cases -> shards -> index: each file whole or absent, the index last.

A shard that an interrupted run has sent to an object store already is not sent again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medsam2.errors import UserError
from medsam2.files import atomic_write
from medsam2.shards.folder import Output, Published
from medsam2.shards.identity import slug
from medsam2.shards.index import ARROW, JSON, write_index
from medsam2.shards.stage import Staged, part_path
from medsam2.shards.tar import END
from medsam2.shards.target import Target

BLOCK = 1 << 20
WRITERS = 4
SENT = "uploaded.json"
SHARD = re.compile(r"(?P<group>(?P<dataset>.+)-\w+)-(?P<number>\d{6,})\.tar")
PARTIAL = re.compile(r"\.(?P<name>.+)\.\d+\.partial")

Entry = dict[str, Any]


@dataclass(frozen=True)
class ShardPlan:
    """The name of a shard and the cases in it, in order."""

    name: str
    members: tuple[Staged, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return sum(member.size for member in self.members) + len(END)


def plan_shards(staged: Sequence[Staged], limit: int, taken: Collection[str] = ()) -> list[ShardPlan]:
    """Cases in a fixed order, in shards of at most `limit` bytes; names go on after those that are `taken`."""
    first: dict[str, int] = defaultdict(int)
    for name in taken:
        if match := SHARD.fullmatch(name):
            first[match["group"]] = max(first[match["group"]], int(match["number"]) + 1)
    groups: dict[str, list[Staged]] = defaultdict(list)
    for result in sorted(staged, key=lambda r: r.job.case):
        groups[f"{slug(result.job.ref.dataset)}-{result.job.split}"].append(result)
    return [
        ShardPlan(f"{group}-{number:06d}.tar", tuple(members))
        for group in sorted(groups)
        for number, members in enumerate(_batches(groups[group], limit), first[group])
    ]


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


def write_shards(
    plans: Sequence[ShardPlan], output: Output, published: Published | None, progress: Callable[[int, int], None]
) -> tuple[dict[str, Entry], list[dict[str, Any]]]:
    """Write the shards; returns bytes and sha256 by shard, and the index rows.

    What an interrupted run left in the target goes first: shards of these data sets that no index names.

    Args:
        progress: called with (shards done, of).

    Raises:
        UserError: a shard could not be sent, or is not what was sent.
    """
    _sweep(output.target, plans, published)
    shards: dict[str, Entry] = {}
    rows: list[dict[str, Any]] = []
    written = _write_here(plans, output) if output.target.local is not None else _send(plans, output)
    for done, (plan, entry) in enumerate(zip(plans, written, strict=True)):
        progress(done, len(plans))
        shards[plan.name] = entry
        offset = 0
        for member in plan.members:
            rows += [_moved(row, plan.name, offset) for row in member.rows]
            offset += member.size
    progress(len(plans), len(plans))
    return shards, rows


def _write_here(plans: Sequence[ShardPlan], output: Output) -> Iterator[Entry]:
    """Several shards at once: hashing and writing leave the interpreter free."""
    with ThreadPoolExecutor(WRITERS) as pool:
        yield from pool.map(lambda plan: _write_shard(plan, output), plans)


def _send(plans: Sequence[ShardPlan], output: Output) -> Iterator[Entry]:
    """One shard after another to a URL; what is there from an interrupted run is not sent again."""
    sent = _read_sent(output)
    for plan in plans:
        entry = _sent_before(plan, output, sent.get(plan.name))
        if entry is None:
            entry = _write_shard(plan, output)
            sent[plan.name] = entry
            with atomic_write(output.staging / SENT, "w") as file:
                json.dump(sent, file)
        yield entry


def publish(output: Output, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Publish the index: `index.json` first, `index.arrow` last."""
    target = output.target
    if target.local is not None:
        write_index(target.local, rows, summary)
        return
    with tempfile.TemporaryDirectory(prefix="index-", dir=output.staging) as folder:
        write_index(Path(folder), rows, summary)
        for name in (JSON, ARROW):
            try:
                with open(Path(folder) / name, "rb") as source, target.write(name) as file:
                    shutil.copyfileobj(source, file, BLOCK)
            except Exception as error:  # each protocol has exceptions of its own
                raise _not_sent(target, name, error) from error


def _write_shard(plan: ShardPlan, output: Output) -> Entry:
    target = output.target
    try:
        with target.write(plan.name) as file:
            digest = _copy(plan, output.staging, file)
        size = target.size(plan.name)
    except Exception as error:
        if target.local is not None or isinstance(error, UserError):
            raise
        raise _not_sent(target, plan.name, error) from error
    if size != plan.size:
        raise UserError(f"{target.where}/{plan.name}: {size} bytes were written, expected {plan.size}; run it again.")
    return {"bytes": plan.size, "sha256": digest}


def _not_sent(target: Target, name: str, error: Exception) -> UserError:
    return UserError(
        f"{target.where}/{name}: could not be sent ({type(error).__name__}: {error}); run the same command again: what "
        "is there already is not sent again."
    )


def _copy(plan: ShardPlan, staging: Path, file: IO[bytes] | None) -> str:
    """Write the shard, or nothing at all, and return its sha256."""
    digest = hashlib.sha256()
    for member in plan.members:
        with open(part_path(staging, member.job), "rb") as part:
            while block := part.read(BLOCK):
                digest.update(block)
                if file:
                    file.write(block)
    digest.update(END)
    if file:
        file.write(END)
    return digest.hexdigest()


def _read_sent(output: Output) -> dict[str, Entry]:
    try:
        return dict(json.loads((output.staging / SENT).read_text()))
    except (OSError, ValueError):
        return {}


def _sent_before(plan: ShardPlan, output: Output, entry: Entry | None) -> Entry | None:
    """The entry of a shard that an earlier run has sent, if what would be sent now is equal."""
    if output.target.local is not None or entry is None or entry.get("bytes") != plan.size:
        return None
    if output.target.size(plan.name) != plan.size or _copy(plan, output.staging, None) != entry.get("sha256"):
        return None
    return entry


def _sweep(target: Target, plans: Sequence[ShardPlan], published: Published | None) -> None:
    """Delete what an interrupted run left: partial files, and shards of these data sets that are in no index."""
    datasets = {slug(member.job.ref.dataset) for plan in plans for member in plan.members}
    live: set[str] = set()
    if published:
        datasets |= published.datasets
        # index.json may be newer than index.arrow, by a kill between the two: what only it names is not read by anyone
        live = set(published.shards)
    live |= {plan.name for plan in plans}
    for name in target.names():
        partial = PARTIAL.fullmatch(name)
        match = SHARD.fullmatch(partial["name"] if partial else name)
        ours = match is not None and match["dataset"] in datasets
        if (ours and (partial or name not in live)) or (partial and partial["name"] in (ARROW, JSON)):
            target.delete(name)


def _moved(row: dict[str, Any], shard: str, offset: int) -> dict[str, Any]:
    moved = {name: [at + offset for at in row[name]] for name in ("frame_offset", "mask_offset")}
    return {**row, **moved, "json_offset": row["json_offset"] + offset, "shard": shard}
