"""Patients out of the shards again: only the shards that hold them are written anew.

What stays is copied byte by byte into new shards, the index is published, and then the old shards go. A kill leaves the
old state or the new one, and running it again clears away what either left: no shard outside of the index remains.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsam2.errors import UserError
from medsam2.files import sync_folder
from medsam2.shards.folder import FAILURES, STAGING, lock_folder, read_table
from medsam2.shards.identity import LENGTH, SALT_VARIABLE, read_salt, salt_file, salted
from medsam2.shards.index import ARROW, JSON, read_index, write_index
from medsam2.shards.publish import SHARD
from medsam2.shards.summary import summarise
from medsam2.shards.tar import BLOCK, END
from medsam2.shards.target import Target, open_target

PARTIAL = re.compile(r"\.(.+\.tar|index\.(arrow|json)|failures\.jsonl)\.\d+\.partial")
KEY = re.compile(r"((?:.*/|)[^.]+)[.]")
OFFSETS = ("frame_offset", "mask_offset")

Row = dict[str, Any]


@dataclass(frozen=True)
class Removed:
    """What was taken out.

    Attributes:
        cases, segments: of the patients.
        shards_rewritten: new shards, which hold what stays of the old ones.
        shards_deleted: shards that were deleted: those of the patients, and what an earlier kill had left.
    """

    cases: int
    segments: int
    shards_rewritten: tuple[str, ...]
    shards_deleted: tuple[str, ...]


@dataclass(frozen=True)
class _State:
    """A published index. `live` are the shards that `index.arrow` names: it is what readers go by."""

    rows: list[Row]
    summary: dict[str, Any]

    @property
    def live(self) -> set[str]:
        return {row["shard"] for row in self.rows}

    @property
    def datasets(self) -> set[str]:
        return {row["dataset"] for row in self.rows} | set(self.summary.get("datasets", ()))

    @property
    def retired(self) -> set[str]:
        return set(self.summary.get("retired_shards", ()))


def remove_patients(shards: str | Path, names: Sequence[str]) -> Removed:
    """Take patients out of a folder (or URL) of shards; nobody else may write there meanwhile.

    Args:
        names: of patients as the source has them, or the 16 hexadecimal digits that stand for them in the shards.

    Raises:
        UserError: no shards there, a name that nobody has, an unfinished prepare, a damaged shard, or no space.
    """
    target = open_target(shards)
    with _alone(target):
        state = _read(target)
        patients = _find(state, names, target.where)
        leftovers = _sweep(target, state.live, state)
        gone = [row for row in state.rows if row["patient"] in patients]
        if not gone:
            _drop_failures(target, patients)
            return Removed(0, 0, (), leftovers)
        rows, files = _rewrite(target, state, patients)
        after = _State(rows, _summary(target, state, rows, files, patients))
        with _told(f"{target.where}: the index could not be written; run the same command again."):
            _publish(target, after)
        with _told(f"{target.where}: the patient is out of the index, but not all old files could be deleted; run the "
                   "same command again."):  # fmt: skip
            deleted = _sweep(target, after.live, after)
            _drop_failures(target, patients)
    cases = {(row["dataset"], row["case"]) for row in gone}
    return Removed(len(cases), len(gone), tuple(sorted(files)), tuple(sorted({*leftovers, *deleted})))


# ------------------------------------------------------------------------------------------- what there is, who goes


def _read(target: Target) -> _State:
    """The index as it is published.

    Raises:
        UserError: it is missing or not readable.
    """
    if target.size(ARROW) is None:
        raise UserError(f"{target.where}: holds no {ARROW}; make shards with `medsam2 prepare`.")
    rows = read_table(target).to_pylist()
    try:
        summary = json.loads(target.read(JSON))
        return _State(rows, {**summary, "shards": dict(summary["shards"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{target.where}/{JSON}: not readable ({error}); make it again with `medsam2 prepare --index-only`."
        ) from None


def _find(state: _State, names: Sequence[str], where: str) -> set[str]:
    """Salted ids of the named patients, and of those whom an interrupted removal left in the index.

    Raises:
        UserError: a name that no patient has.
    """
    present = {row["patient"] for row in state.rows}
    before = set(state.summary.get("removed_patients", ()))
    found = before & present
    for name in names:
        ids = {name} & (present | before)
        if not ids:
            salt = read_salt()
            ids = {salted(salt, "patient", dataset, name) for dataset in state.datasets} & (present | before)
        if not ids:
            raise UserError(
                f"{where}: none of its {len(present)} patients is {name!r}. Give the name as the source has it, under "
                f"the salt with which the shards were prepared ({SALT_VARIABLE}, or {salt_file()}), or the {LENGTH} "
                "digits that stand for the patient in the shards."
            )
        found |= ids
    return found


# --------------------------------------------------------------------------------------------------- the new shards


def _rewrite(target: Target, state: _State, patients: Collection[str]) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """All rows that stay, in their order, and the new shards with bytes and sha256; an error leaves no new shard."""
    by_shard: dict[str, list[Row]] = defaultdict(list)
    for row in state.rows:
        by_shard[row["shard"]].append(row)
    taken = {*target.names(), *state.summary["shards"], *state.live, *state.retired}
    moved: dict[tuple[str, str], Row] = {}
    files: dict[str, dict[str, Any]] = {}
    try:
        for shard, rows in sorted(by_shard.items()):
            kept = [row for row in rows if row["patient"] not in patients]
            if not kept or len(kept) == len(rows):
                continue
            new = _next_free(shard, taken)
            taken.add(new)
            files[new] = {}
            with _told(f"{target.where}/{new}: could not be written; nothing has changed."):
                changed, files[new] = _copy_shard(target, shard, kept, new, state.summary["shards"].get(shard, {}))
            moved |= {(shard, row["key"]): row for row in changed}
    except BaseException:
        for new in files:
            if target.size(new) is not None:
                target.delete(new)
        raise
    stay = [row for row in state.rows if row["patient"] not in patients]
    return [moved.get((row["shard"], row["key"]), row) for row in stay], files


def _next_free(shard: str, taken: Collection[str]) -> str:
    """The name after the last of the shard's group."""
    match = SHARD.fullmatch(shard)
    group = match["group"] if match else Path(shard).stem
    of_group = re.compile(re.escape(group) + r"-(\d{6,})\.tar")
    numbers = [int(m[1]) for m in map(of_group.fullmatch, taken) if m]
    return f"{group}-{max(numbers, default=-1) + 1:06d}.tar"


def _copy_shard(
    target: Target, shard: str, kept: Sequence[Row], new: str, stated: dict[str, Any]
) -> tuple[list[Row], dict[str, Any]]:
    """Copy the members of the `kept` rows of `shard` to `new`; returns these rows there, and its bytes and sha256.

    Raises:
        UserError: `shard` is missing, not what the index says, or no tar.
    """
    with _local_copy(target, shard) as path:
        _check_shard(path, shard, target.where, stated)
        keys = {row["key"] for row in kept}
        places = {at for row in kept for at in (row["json_offset"], *row["frame_offset"], *row["mask_offset"])}
        moved: dict[int, int] = {}
        digest, end = hashlib.sha256(), 0
        with open(path, "rb") as source, target.write(new) as out:
            for name, start, payload, stop in _members(path, f"{target.where}/{shard}"):
                key = KEY.match(name)
                if payload not in places and not (key and key[1] in keys):
                    continue
                source.seek(start)
                block = source.read(stop - start)
                moved[payload] = end + payload - start
                digest.update(block)
                out.write(block)
                end += len(block)
            if not places <= set(moved):
                raise UserError(f"{target.where}/{shard}: is not what the index says; prepare the shards again.")
            digest.update(END)
            out.write(END)
    rows = [
        {**row, "shard": new, "json_offset": moved[row["json_offset"]],
         **{name: [moved[at] for at in row[name]] for name in OFFSETS}}
        for row in kept
    ]  # fmt: skip
    return rows, {"bytes": end + len(END), "sha256": digest.hexdigest()}


def _check_shard(path: Path, shard: str, where: str, stated: dict[str, Any]) -> None:
    """Refuse to copy damage, which the new sums would hide."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if stated.get("sha256", digest) != digest:
        raise UserError(
            f"{where}/{shard}: is damaged, its sha256 is not that of {JSON}; nothing has changed. Put an intact copy "
            "there, or prepare the shards again without the patient."
        )


def _members(path: Path, where: str) -> list[tuple[str, int, int, int]]:
    """(name, first byte of the header, of the payload, end with padding) of every member of a tar."""
    try:
        with tarfile.open(path, "r:") as archive:
            return [(m.name, m.offset, m.offset_data, m.offset_data + m.size + -m.size % BLOCK) for m in archive]
    except tarfile.TarError as error:
        raise UserError(f"{where}: not a readable tar ({error}); nothing has changed.") from None


@contextmanager
def _local_copy(target: Target, name: str) -> Iterator[Path]:
    """A file of the target as a file of this machine.

    Raises:
        UserError: it is not there.
    """
    if target.size(name) is None:
        raise UserError(f"{target.where}/{name}: the index names this shard but it is not there; prepare again.")
    if target.local is not None:
        yield target.local / name
        return
    with tempfile.TemporaryDirectory(prefix="medsam2-") as folder:
        target.copy_to(name, Path(folder) / "shard.tar")
        yield Path(folder) / "shard.tar"


# ------------------------------------------------------------------------------------------- the index, and cleaning


def _summary(
    target: Target, state: _State, rows: Sequence[Row], files: dict[str, dict[str, Any]], patients: set[str]
) -> dict[str, Any]:
    """`index.json` without the patients: ids, cases and content hashes of theirs are gone, but for the tombstones."""
    old = state.summary
    live = {row["shard"] for row in rows}
    shards = {name: entry for name, entry in {**old["shards"], **files}.items() if name in live}
    gone = {row["case"] for row in state.rows if row["patient"] in patients}
    moves = [move for move in old.get("moved_patients", ()) if move.get("patient") not in patients]
    lost = sum(_is_of(line, patients) for line in _failure_lines(target))
    new = summarise(
        rows,
        shards,
        old.get("configuration", {}),
        max(0, old.get("failed_cases", 0) - lost),
        {**{name: {} for name in state.datasets}, **old.get("datasets", {})},
        sorted({*old.get("removed_patients", ()), *patients}),
        [{**move, "like": "" if move.get("like") in gone else move.get("like", "")} for move in moves],
    )
    # what others wrote there stays unless it tells of the patients
    ids = {*patients, *gone, *({row["content_hash"] for row in state.rows} - {row["content_hash"] for row in rows})}
    more = {k: v for k, v in old.items() if k not in new and not any(i in json.dumps(v) for i in ids if i)}
    return {**more, **new, "retired_shards": sorted(state.retired | state.live - live)}


def _publish(target: Target, state: _State) -> None:
    """`index.json` first, `index.arrow` last, as `write_index` does."""
    if target.local is not None:
        write_index(target.local, state.rows, state.summary)
        return
    with tempfile.TemporaryDirectory(prefix="medsam2-") as folder:
        write_index(Path(folder), state.rows, state.summary)
        for name in (JSON, ARROW):
            with open(Path(folder) / name, "rb") as source, target.write(name) as out:
                shutil.copyfileobj(source, out)


def _sweep(target: Target, live: Collection[str], state: _State) -> tuple[str, ...]:
    """Delete the shards of ours that the index does not name, whole or partly written; returns the whole ones."""
    deleted = []
    for name in target.names():
        match = SHARD.fullmatch(name)
        ours = name in state.retired or (match is not None and match["dataset"] in state.datasets)
        if (ours and name not in live) or PARTIAL.fullmatch(name):
            target.delete(name)
            deleted += [name] if ours else []
    if target.local is not None:
        sync_folder(target.local)
    return tuple(deleted)


def _failure_lines(target: Target) -> list[str]:
    return target.read(FAILURES).decode().splitlines() if target.size(FAILURES) is not None else []


def _is_of(line: str, patients: Collection[str]) -> bool:
    """Whether a line of the failed cases tells of one of the patients."""
    try:
        entry = json.loads(line)
        return entry["patient"] in patients
    except (ValueError, KeyError, TypeError):
        return False


def _drop_failures(target: Target, patients: Collection[str]) -> None:
    """Take the patients out of the list of failed cases, which has their names."""
    lines = _failure_lines(target)
    kept = [line for line in lines if not _is_of(line, patients)]
    if len(kept) == len(lines):
        return
    if not kept:
        target.delete(FAILURES)
        return
    with target.write(FAILURES) as out:
        out.write("".join(f"{line}\n" for line in kept).encode())


@contextmanager
def _alone(target: Target) -> Iterator[None]:
    """Keep any prepare or removal out of a local folder meanwhile; the lock falls with the process that holds it.

    Raises:
        UserError: one is at work, or a prepare did not finish (what it staged could hold the patients).
    """
    if target.local is None:
        yield
        return
    read_index(target.local)
    staging = target.local / STAGING
    with lock_folder(staging, target.where, "command"):
        if any(staging.rglob("*.part*")):
            raise UserError(
                f"{staging}: a prepare was not finished, and what it kept there may hold the patients; run it to its "
                f"end first, or delete {staging}."
            )
        try:
            yield
        finally:
            (staging / "lock").unlink(missing_ok=True)
            if not any(staging.iterdir()):
                staging.rmdir()


@contextmanager
def _told(message: str) -> Iterator[None]:
    """An `OSError` as an error that says where things stand."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{message} ({error})") from None
