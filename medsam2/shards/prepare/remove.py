"""Patients out of the shards again: the shards that hold them are replaced by copies without them.

A journal beside the shards says which files are new and which go. The new shards are written, then the index, which is
what readers go by, then the old shards are deleted. After a kill readers see the old state or the new one, and the next
removal finishes what the journal says. Nothing else is remembered.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsam2.errors import UserError
from medsam2.files import atomic_write, file_sha256
from medsam2.shards.index import JSON, read_index, write_index
from medsam2.shards.prepare.folder import FAILURES, SOURCES, STAGING, lock_folder
from medsam2.shards.prepare.pseudonyms import LENGTH, SALT_VARIABLE, read_salt, salt_file, salted
from medsam2.shards.prepare.publish import PARTIAL, Row
from medsam2.shards.summary import summarise
from medsam2.shards.tar import BLOCK
from medsam2.shards.target import UrlFolder, open_folder

JOURNAL = "removal.json"
KEY = re.compile(r"((?:.*/)?[^/.]+)\.")
"""The key of a member's sample: its name up to the first dot of the last part."""
OFFSETS = ("frame_offset", "mask_offset")


@dataclass(frozen=True)
class Removed:
    """What was taken out: cases and segments of the patients, and how many shards were replaced or deleted."""

    cases: int
    segments: int
    shards: int


def remove_patients(shards: str | Path, names: Sequence[str]) -> Removed:
    """Take patients out of a folder of shards.

    Args:
        names: of patients as the source has them, or the 16 hexadecimal digits that stand for them in the shards.

    Raises:
        UserError: no shards there, a name that nobody has, an unfinished prepare, a damaged shard, or no space.
    """
    folder = open_folder(shards)
    if isinstance(folder, UrlFolder):
        raise UserError(
            f"{shards}: patients are taken out of folders of this machine; copy the shards here, take them out, and "
            "copy them back with a tool that also deletes what is gone (aws s3 sync --delete, rclone sync)."
        )
    index = read_index(folder)
    with _alone(folder):
        rows: list[Row] = index.table.to_pylist()
        summary = _read_json(folder / JSON)
        finished = _finish(folder, {row["shard"] for row in rows})
        patients = _find(rows, summary, names, finished, folder)
        gone = [row for row in rows if row["patient"] in patients]
        old = sorted({row["shard"] for row in gone})
        if gone:
            kept, entries = _replace_shards(folder, rows, patients, old, summary.get("shards", {}))
            _forget(folder, patients)
            provenance, failed = summary.get("datasets"), summary.get("failed_cases", 0)
            write_index(folder, kept, summarise(kept, entries, summary.get("configuration", {}), failed, provenance))
        for name in (*old, JOURNAL):
            (folder / name).unlink(missing_ok=True)
    return Removed(len({(row["dataset"], row["case"]) for row in gone}), len(gone), len(old))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep any prepare or removal out of the folder meanwhile.

    Raises:
        UserError: one is at work, a prepare did not finish (what it staged could hold the patients), or a file cannot
            be written.
    """
    staging = folder / STAGING
    with lock_folder(staging, str(folder), "command"):
        if any(staging.rglob("*.part*")):
            raise UserError(
                f"{staging}: a prepare was not finished, and what it kept there may hold the patients; run it to its "
                f"end first, or delete {staging}."
            )
        try:
            yield
        except OSError as error:
            raise UserError(f"{folder}: {error}; mend that and run the same command again.") from None
        finally:
            (staging / "lock").unlink(missing_ok=True)
            if not any(staging.iterdir()):
                staging.rmdir()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not readable ({error}); `medsam2 prepare {path.parent} --index-only --force` makes {JSON} again."
        ) from None


def _finish(folder: Path, live: Collection[str]) -> set[str]:
    """Delete what a removal that was killed had still to delete; returns the salted ids of its patients."""
    for path in folder.iterdir():
        if PARTIAL.fullmatch(path.name):
            path.unlink()
    if not (folder / JOURNAL).is_file():
        return set()
    journal = _read_json(folder / JOURNAL)
    for name in set(journal["shards"]) - set(live):
        (folder / name).unlink(missing_ok=True)
    return set(journal["patients"])


def _find(
    rows: Sequence[Row], summary: Mapping[str, Any], names: Sequence[str], finished: set[str], folder: Path
) -> set[str]:
    """Salted ids of the named patients, and of those whom an interrupted removal left in the index.

    Raises:
        UserError: a name that no patient has.
    """
    present = {row["patient"] for row in rows}
    datasets = {row["dataset"] for row in rows} | set(summary.get("datasets", ()))
    patients = set(finished)
    for name in names:
        ids = {name, *(salted(read_salt(), "patient", dataset, name) for dataset in datasets)} & (present | finished)
        if not ids:
            raise UserError(
                f"{folder}: none of its {len(present)} patients is {name!r}. Give the name as the source has it, under "
                f"the salt with which the shards were prepared ({SALT_VARIABLE}, or {salt_file()}), or the {LENGTH} "
                "digits that stand for the patient in the shards."
            )
        patients |= ids
    return patients


def _replace_shards(
    folder: Path, rows: Sequence[Row], patients: set[str], old: Sequence[str], stated: Mapping[str, dict[str, Any]]
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """All rows that stay, in their order, and the entries (bytes, sha256) of their shards; an error changes nothing."""
    kept = [row for row in rows if row["patient"] not in patients]
    staying: dict[str, list[Row]] = defaultdict(list)
    for row in kept:
        staying[row["shard"]].append(row)
    taken = {path.name for path in folder.iterdir()}
    new: dict[str, str] = {}
    for shard in old:
        if shard in staying:
            new[shard] = _next_name(shard, taken)
            taken.add(new[shard])
    entries = {shard: stated[shard] for shard in staying if shard in stated and shard not in new}
    moved: dict[tuple[str, str], Row] = {}  # tars of other tools may use one key in several data sets
    try:
        with atomic_write(folder / JOURNAL, "w") as file:
            json.dump({"patients": sorted(patients), "shards": sorted({*old, *new.values()})}, file)
        for shard, name in new.items():
            offsets = _copy_shard(folder / shard, folder / name, {r["key"] for r in staying[shard]}, stated.get(shard))
            entries[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
            moved |= {(shard, row["key"]): _moved(row, name, offsets) for row in staying[shard]}
    except BaseException:
        for name in (*new.values(), JOURNAL):
            (folder / name).unlink(missing_ok=True)
        raise
    return [moved.get((row["shard"], row["key"]), row) for row in kept], entries


def _next_name(shard: str, taken: Collection[str]) -> str:
    """`liver-train-000001.tar` -> the same with the first number after all that are taken."""
    group = re.sub(r"(-\d{6,})?\.tar$", "", shard)
    of_group = re.compile(re.escape(group) + r"-(\d{6,})\.tar")
    numbers = [int(match[1]) for match in map(of_group.fullmatch, taken) if match]
    return f"{group}-{max(numbers, default=-1) + 1:06d}.tar"


def _copy_shard(old: Path, new: Path, keys: Collection[str], stated: Mapping[str, Any] | None) -> dict[int, int]:
    """Copy the samples `keys` of a tar to another; returns the new offset of each payload by the old one.

    Raises:
        UserError: the tar is missing or damaged: the sums of a copy would hide it.
    """
    try:
        if stated and stated["sha256"] != file_sha256(old):
            raise tarfile.ReadError(f"its sha256 is not that of {JSON}")
        offsets = {}
        with tarfile.open(old, "r:") as source, atomic_write(new) as file, tarfile.open(fileobj=file, mode="w") as out:
            for member in source:
                key = KEY.match(member.name)
                if key and key[1] in keys:
                    out.addfile(member, source.extractfile(member))
                    offsets[member.offset_data] = out.offset - member.size - -member.size % BLOCK
        return offsets
    except (FileNotFoundError, tarfile.TarError) as error:
        raise UserError(
            f"{old}: is damaged or missing ({error}); nothing has changed. Put an intact copy there, or prepare the "
            "shards again without the patient."
        ) from None


def _moved(row: Row, shard: str, offsets: Mapping[int, int]) -> Row:
    lists = {name: [offsets[at] for at in row[name]] for name in OFFSETS}
    return {**row, **lists, "shard": shard, "json_offset": offsets.get(row["json_offset"], 0)}


def _forget(folder: Path, patients: set[str]) -> None:
    """Take the patients out of `sources.json` and of the list of failed cases."""
    if (folder / SOURCES).is_file():
        states = {c: state for c, state in _read_json(folder / SOURCES).items() if state["patient"] not in patients}
        with atomic_write(folder / SOURCES, "w") as file:
            json.dump(states, file, indent=0, sort_keys=True)
    if (folder / FAILURES).is_file():
        lines = (folder / FAILURES).read_text().splitlines(keepends=True)
        with atomic_write(folder / FAILURES, "w") as file:
            file.writelines(line for line in lines if not any(patient in line for patient in patients))
