"""Patients out of the shards again: the shards that hold them are replaced by copies without them.

A journal beside the shards says which files are new and which go. The new shards are written, then the index, which is
what readers go by, then the old shards are deleted. After a kill readers see the old state or the new one, and the next
removal finishes what the journal says. Nothing else is remembered.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsam2.errors import UserError
from medsam2.files import atomic_write
from medsam2.shards.folder import FAILURES, STAGING, lock_folder
from medsam2.shards.identity import LENGTH, SALT_VARIABLE, read_salt, salt_file, salted
from medsam2.shards.index import ARROW, JSON, read_index, write_index
from medsam2.shards.publish import PARTIAL, Row
from medsam2.shards.source_state import SOURCES
from medsam2.shards.summary import summarise
from medsam2.shards.tar import BLOCK, END
from medsam2.shards.target import UrlFolder, open_folder

JOURNAL = "removal.json"
KEY = re.compile(r"((?:.*/|)[^.]+)[.]")
OFFSETS = ("frame_offset", "mask_offset")


@dataclass(frozen=True)
class Removed:
    """What was taken out: cases and segments of the patients, and how many shards were replaced or deleted."""

    cases: int
    segments: int
    shards: int


@dataclass(frozen=True)
class _Place:
    """The shards: a local folder, or a URL with a temporary `folder` into which its files are copied."""

    where: str
    folder: Path
    url: UrlFolder | None

    def names(self) -> set[str]:
        return set(self.url.sizes()) if self.url else {path.name for path in self.folder.iterdir()}

    def fetch(self, *names: str) -> None:
        """Copy files of a URL into the folder."""
        for name in names if self.url else ():
            self.url.get(name, self.folder)  # type: ignore[union-attr]

    def publish(self, *names: str) -> None:
        """Send files of the folder to a URL."""
        for name in names if self.url else ():
            self.url.put(self.folder / name)  # type: ignore[union-attr]

    def delete(self, names: Collection[str]) -> None:
        for name in names:
            if self.url:
                self.url.delete(name)
            (self.folder / name).unlink(missing_ok=True)


def remove_patients(shards: str | Path, names: Sequence[str]) -> Removed:
    """Take patients out of a folder (or URL) of shards; nobody else may write there meanwhile.

    Args:
        names: of patients as the source has them, or the 16 hexadecimal digits that stand for them in the shards.

    Raises:
        UserError: no shards there, a name that nobody has, an unfinished prepare, a damaged shard, or no space.
    """
    with _opened(shards) as place:
        index = read_index(place.folder)
        rows: list[Row] = index.table.to_pylist()
        summary = _read_json(place, JSON)
        finished = _finish(place, {row["shard"] for row in rows})
        patients = _find(rows, summary, names, finished, place.where)
        gone = [row for row in rows if row["patient"] in patients]
        if not gone:
            place.delete([JOURNAL] if finished else [])
            return Removed(0, 0, 0)
        old = sorted({row["shard"] for row in gone})
        place.fetch(*old)
        kept, entries = _replace_shards(place, rows, patients, old, summary.get("shards", {}))
        with _explain(place.where, "the index could not be written; run the same command again."):
            changed = _forget(place, patients)
            write_index(place.folder, kept, _summary(summary, kept, entries, rows, patients))
            place.publish(*changed, JSON, ARROW)
        with _explain(place.where, "the patient is out of the index, but not all old files could be deleted; run the "
                      "same command again."):  # fmt: skip
            place.delete([*old, JOURNAL])
    return Removed(len({(row["dataset"], row["case"]) for row in gone}), len(gone), len(old))


@contextmanager
def _opened(shards: str | Path) -> Iterator[_Place]:
    """The place with its index in the folder; any prepare or removal is kept out of a local folder meanwhile.

    Raises:
        UserError: one is at work, or a prepare did not finish (what it staged could hold the patients).
    """
    folder = open_folder(shards)
    if isinstance(folder, UrlFolder):
        with tempfile.TemporaryDirectory(prefix="medsam2-") as scratch:
            place = _Place(str(shards), Path(scratch), folder)
            there = place.names()
            if ARROW not in there:
                raise UserError(f"{shards}: holds no {ARROW}; make shards with `medsam2 prepare`.")
            place.fetch(*({ARROW, JSON, SOURCES, FAILURES, JOURNAL} & there))
            yield place
        return
    read_index(folder)
    staging = folder / STAGING
    with lock_folder(staging, str(folder), "command"):
        if any(staging.rglob("*.part*")):
            raise UserError(
                f"{staging}: a prepare was not finished, and what it kept there may hold the patients; run it to its "
                f"end first, or delete {staging}."
            )
        try:
            yield _Place(str(folder), folder, None)
        finally:
            (staging / "lock").unlink(missing_ok=True)
            if not any(staging.iterdir()):
                staging.rmdir()


def _read_json(place: _Place, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((place.folder / name).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{place.where}/{name}: not readable ({error}); make it again with `medsam2 prepare --index-only`."
        ) from None


def _finish(place: _Place, live: Collection[str]) -> set[str]:
    """Delete what a removal that was killed had still to delete; returns the salted ids of its patients."""
    for path in place.folder.iterdir():
        if PARTIAL.fullmatch(path.name):
            path.unlink()
    if not (place.folder / JOURNAL).is_file():
        return set()
    journal, there = _read_json(place, JOURNAL), place.names()
    place.delete([name for name in journal["shards"] if name in there and name not in live])
    return set(journal["patients"])


def _find(
    rows: Sequence[Row], summary: Mapping[str, Any], names: Sequence[str], finished: set[str], where: str
) -> set[str]:
    """Salted ids of the named patients, and of those whom an interrupted removal left in the index.

    Raises:
        UserError: a name that no patient has.
    """
    present = {row["patient"] for row in rows}
    datasets = {row["dataset"] for row in rows} | set(summary.get("datasets", ()))
    patients = set(finished)
    for name in names:
        ids = {name} & (present | finished)
        if not ids:
            salt = read_salt()
            ids = {salted(salt, "patient", dataset, name) for dataset in datasets} & (present | finished)
        if not ids:
            raise UserError(
                f"{where}: none of its {len(present)} patients is {name!r}. Give the name as the source has it, under "
                f"the salt with which the shards were prepared ({SALT_VARIABLE}, or {salt_file()}), or the {LENGTH} "
                "digits that stand for the patient in the shards."
            )
        patients |= ids
    return patients


def _replace_shards(
    place: _Place, rows: Sequence[Row], patients: set[str], old: Sequence[str], stated: Mapping[str, dict[str, Any]]
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """All rows that stay, in their order, and the entries (bytes, sha256) of their shards; an error changes nothing."""
    staying: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["patient"] not in patients:
            staying[row["shard"]].append(row)
    new: dict[str, str] = {}
    for shard in old:
        if shard in staying:
            new[shard] = _next_name(shard, {*place.names(), *staying, *new.values()})
    entries = {shard: stated[shard] for shard in staying if shard in stated and shard not in new}
    moved: dict[tuple[str, str], Row] = {}
    try:
        with _explain(place.where, "could not be written; nothing has changed."):
            with atomic_write(place.folder / JOURNAL, "w") as file:
                json.dump({"patients": sorted(patients), "shards": sorted({*old, *new.values()})}, file)
            place.publish(JOURNAL)
            for shard, name in new.items():
                changed, entries[name] = _copy_shard(place, shard, staying[shard], name, stated.get(shard, {}))
                place.publish(name)
                moved |= {(shard, row["key"]): row for row in changed}
    except BaseException:
        place.delete([name for name in (*new.values(), JOURNAL) if name in place.names()])
        raise
    kept = [row for row in rows if row["patient"] not in patients]
    return [moved.get((row["shard"], row["key"]), row) for row in kept], entries


def _next_name(shard: str, taken: Collection[str]) -> str:
    """`liver-train-000001.tar` -> the same with the first number after all that are taken."""
    group = re.sub(r"(-\d{6,})?\.tar$", "", shard)
    of_group = re.compile(re.escape(group) + r"-(\d{6,})\.tar")
    numbers = [int(match[1]) for match in map(of_group.fullmatch, taken) if match]
    return f"{group}-{max(numbers, default=-1) + 1:06d}.tar"


def _copy_shard(
    place: _Place, shard: str, kept: Sequence[Row], new: str, stated: Mapping[str, Any]
) -> tuple[list[Row], dict[str, Any]]:
    """Copy the members of the `kept` rows of `shard` to `new`; returns these rows there, and its bytes and sha256.

    Raises:
        UserError: `shard` is missing, not what the index says, or no tar.
    """
    keys = {row["key"] for row in kept}
    places = {at for row in kept for name in OFFSETS for at in row[name]}
    places |= {row["json_offset"] for row in kept if row["json_length"]}
    moved: dict[int, int] = {}
    digest, end = hashlib.sha256(), 0
    with _sound_shard(place, shard, stated) as source, atomic_write(place.folder / new) as out:
        for name, start, payload, stop in _members(source, f"{place.where}/{shard}"):
            key = KEY.match(name)
            if payload in places or (key and key[1] in keys):
                source.seek(start)
                block = source.read(stop - start)
                moved[payload] = end + payload - start
                digest.update(block)
                out.write(block)
                end += len(block)
        if not places <= set(moved):
            raise UserError(f"{place.where}/{shard}: is not what the index says; prepare the shards again.")
        digest.update(END)
        out.write(END)
    rows = [
        {**row, "shard": new, "json_offset": moved.get(row["json_offset"], 0),
         **{name: [moved[at] for at in row[name]] for name in OFFSETS}}
        for row in kept
    ]  # fmt: skip
    return rows, {"bytes": end + len(END), "sha256": digest.hexdigest()}


@contextmanager
def _sound_shard(place: _Place, shard: str, stated: Mapping[str, Any]) -> Iterator[Any]:
    """The opened shard. Damage is refused: the sums of a copy would hide it."""
    path = place.folder / shard
    if not path.is_file():
        raise UserError(f"{place.where}/{shard}: the index names this shard but it is not there; prepare again.")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if stated.get("sha256", digest) != digest:
            raise UserError(
                f"{place.where}/{shard}: is damaged, its sha256 is not that of {JSON}; nothing has changed. Put an "
                "intact copy there, or prepare the shards again without the patient."
            )
        yield file


def _members(file: Any, where: str) -> list[tuple[str, int, int, int]]:
    """(name, first byte of the header, of the payload, end with padding) of every member of a tar."""
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            return [(m.name, m.offset, m.offset_data, m.offset_data + m.size + -m.size % BLOCK) for m in archive]
    except tarfile.TarError as error:
        raise UserError(f"{where}: not a readable tar ({error}); nothing has changed.") from None


def _forget(place: _Place, patients: set[str]) -> list[str]:
    """Take the patients out of `sources.json` and the list of failed cases; returns the names of what changed."""
    changed = []
    if (place.folder / SOURCES).is_file():
        states = _read_json(place, SOURCES)
        with atomic_write(place.folder / SOURCES, "w") as file:
            kept = {case: state for case, state in states.items() if state["patient"] not in patients}
            json.dump(kept, file, indent=0, sort_keys=True)
        changed.append(SOURCES)
    failures = place.folder / FAILURES
    if failures.is_file():
        lines = failures.read_text().splitlines(keepends=True)
        with atomic_write(failures, "w") as file:
            file.writelines(line for line in lines if not any(patient in line for patient in patients))
    return changed


def _summary(
    old: Mapping[str, Any], rows: Sequence[Row], shards: dict[str, dict[str, Any]], before: Sequence[Row],
    patients: set[str],
) -> dict[str, Any]:  # fmt: skip
    """`index.json` without the patients: no id, case or content hash of theirs stays."""
    gone = {row["case"] for row in before if row["patient"] in patients}
    moves = [move for move in old.get("moved_patients", ()) if move.get("patient") not in patients]
    return summarise(
        rows,
        shards,
        old.get("configuration", {}),
        old.get("failed_cases", 0),
        old.get("datasets"),
        [{**move, "like": "" if move.get("like") in gone else move.get("like", "")} for move in moves],
    )


@contextmanager
def _explain(where: str, message: str) -> Iterator[None]:
    """An `OSError` as an error that says where things stand."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where}: {message} ({error})") from None
