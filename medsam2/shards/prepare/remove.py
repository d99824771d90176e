"""Remove patients from shards: replace the shards that hold them by copies without them.

A journal beside the shards lists new and obsolete files. The new shards are written first, then the index that readers
use, and the old shards are deleted last. After a kill readers see the old state or the new one, and the next removal
finishes the journal.
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
from medsam2.shards.index import SUMMARY_FILE, read_index, write_index
from medsam2.shards.prepare.folder import FAILURES, SOURCES, STAGING, lock_folder
from medsam2.shards.prepare.pseudonyms import HASH_DIGITS, SALT_VARIABLE, read_salt, salt_file, salted_hash
from medsam2.shards.prepare.publish import PARTIAL_NAME, Row
from medsam2.shards.summary import summarise
from medsam2.shards.target import UrlFolder, open_folder

JOURNAL = "removal.json"
KEY = re.compile(r"((?:.*/)?[^/.]+)\.")
"""The key of a member's sample: its name up to the first dot of the base name."""


@dataclass(frozen=True)
class RemovalResult:
    """Numbers of removed cases and segments, and of replaced or deleted shards."""

    cases: int
    segments: int
    shards: int


def remove_patients(shards: str | Path, names: Sequence[str]) -> RemovalResult:
    """Remove patients from a folder of shards.

    Args:
        names: patients' names as in the source data, or their 16 hexadecimal digits as in the shards.

    Raises:
        UserError: there are no shards, a patient is unknown, a prepare is unfinished, a shard is damaged, or the disk
            is full.
    """
    folder = open_folder(shards)
    if isinstance(folder, UrlFolder):
        raise UserError(
            f"{shards}: patients are removed from local folders only; copy the shards here, remove the patients, and "
            "copy the shards back with a tool that also deletes files (aws s3 sync --delete, rclone sync)."
        )
    index = read_index(folder)
    with _lock_shards(folder):
        rows: list[Row] = index.table.to_pylist()
        summary = _read_json(folder / SUMMARY_FILE)
        finished = _finish_removal(folder, {row["shard"] for row in rows})
        patients = _find_patients(rows, summary, names, finished, folder)
        removed = [row for row in rows if row["patient"] in patients]
        old = sorted({row["shard"] for row in removed})
        if removed:
            rest, entries = _replace_shards(folder, rows, patients, old, summary.get("shards", {}))
            _remove_from_lists(folder, patients)
            provenance, failed = summary.get("datasets"), summary.get("failed_cases", 0)
            write_index(folder, rest, summarise(rest, entries, summary.get("configuration", {}), failed, provenance))
        for name in (*old, JOURNAL):
            (folder / name).unlink(missing_ok=True)
    return RemovalResult(len({(row["dataset"], row["case"]) for row in removed}), len(removed), len(old))


@contextmanager
def _lock_shards(folder: Path) -> Iterator[None]:
    """Lock the folder against other prepares and removals.

    Raises:
        UserError: the folder is locked, a prepare is unfinished (its staged cases may hold the patients), or a file
            cannot be written.
    """
    staging = folder / STAGING
    with lock_folder(staging, str(folder), "command"):
        if any(staging.rglob("*.part*")):
            raise UserError(
                f"{staging}: a prepare was interrupted, and its staged cases may hold the patients; run it "
                f"again to finish it, or delete {staging}."
            )
        try:
            yield
        except OSError as error:
            raise UserError(f"{folder}: {error}; fix that and run the same command again.") from None
        finally:
            (staging / "lock").unlink(missing_ok=True)
            if not any(staging.iterdir()):
                staging.rmdir()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not readable ({error}); write it again with `medsam2 prepare {path.parent} --index-only --force`."
        ) from None


def _finish_removal(folder: Path, shards: Collection[str]) -> set[str]:
    """Delete the files that a killed removal left beside `shards`; returns the salted ids of its patients."""
    for path in folder.iterdir():
        if PARTIAL_NAME.fullmatch(path.name):
            path.unlink()
    if not (folder / JOURNAL).is_file():
        return set()
    journal = _read_json(folder / JOURNAL)
    for name in set(journal["shards"]) - set(shards):
        (folder / name).unlink(missing_ok=True)
    return set(journal["patients"])


def _find_patients(
    rows: Sequence[Row], summary: Mapping[str, Any], names: Sequence[str], finished: set[str], folder: Path
) -> set[str]:
    """Return the salted ids of the named patients and of those in an interrupted removal.

    Raises:
        UserError: a patient is unknown.
    """
    present = {row["patient"] for row in rows}
    datasets = {row["dataset"] for row in rows} | set(summary.get("datasets", ()))
    patients = set(finished)
    for name in names:
        hashes = {salted_hash(read_salt(), "patient", dataset, name) for dataset in datasets}
        ids = {name, *hashes} & (present | finished)
        if not ids:
            raise UserError(
                f"{folder}: none of its {len(present)} patients is {name!r}. Give the name as in the source data, with "
                f"the salt of the prepare ({SALT_VARIABLE}, or {salt_file()}), or the patient's {HASH_DIGITS} "
                "hexadecimal digits in the shards."
            )
        patients |= ids
    return patients


def _replace_shards(
    folder: Path, rows: Sequence[Row], patients: set[str], old: Sequence[str], before: Mapping[str, dict[str, Any]]
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Write copies of the `old` shards without the patients; an error removes the copies.

    Args:
        before: entries of `index.json` (bytes, sha256) by shard.

    Returns:
        The rows of the other patients, in their order, and the entries of the shards that hold them.
    """
    rest = [row for row in rows if row["patient"] not in patients]
    by_shard: dict[str, list[Row]] = defaultdict(list)
    for row in rest:
        by_shard[row["shard"]].append(row)
    names = {path.name for path in folder.iterdir()}
    new: dict[str, str] = {}
    for shard in old:
        if shard in by_shard:
            new[shard] = _next_name(shard, names)
            names.add(new[shard])
    entries = {shard: before[shard] for shard in by_shard if shard in before and shard not in new}
    moved: dict[tuple[str, str], Row] = {}  # by shard and key, since tars of other tools may repeat keys
    try:
        with atomic_write(folder / JOURNAL, "w") as file:
            json.dump({"patients": sorted(patients), "shards": sorted({*old, *new.values()})}, file)
        for shard, name in new.items():
            keys = {row["key"] for row in by_shard[shard]}
            offsets = _copy_shard(folder / shard, folder / name, keys, before.get(shard))
            entries[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
            moved |= {(shard, row["key"]): _move_row(row, name, offsets) for row in by_shard[shard]}
    except BaseException:
        for name in (*new.values(), JOURNAL):
            (folder / name).unlink(missing_ok=True)
        raise
    return [moved.get((row["shard"], row["key"]), row) for row in rest], entries


def _next_name(shard: str, names: Collection[str]) -> str:
    """`liver-train-000001.tar` with the number after the highest one in `names`."""
    group = re.sub(r"(-\d{6,})?\.tar$", "", shard)
    pattern = re.compile(re.escape(group) + r"-(\d{6,})\.tar")
    numbers = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
    return f"{group}-{max(numbers, default=-1) + 1:06d}.tar"


def _copy_shard(old: Path, new: Path, keys: Collection[str], entry: Mapping[str, Any] | None) -> dict[int, int]:
    """Copy the samples `keys` of a tar; returns the new offset of each payload by its old offset.

    Raises:
        UserError: the tar is missing or damaged; a copy would get a valid sha256 and hide the damage.
    """
    try:
        if entry and entry["sha256"] != file_sha256(old):
            raise tarfile.ReadError(f"its sha256 is not that of {SUMMARY_FILE}")
        offsets = {}
        with tarfile.open(old, "r:") as source, atomic_write(new) as file, tarfile.open(fileobj=file, mode="w") as out:
            for member in source:
                key = KEY.match(member.name)
                if key and key[1] in keys:
                    out.addfile(member, source.extractfile(member))
                    offsets[member.offset_data] = out.offset - member.size - -member.size % tarfile.BLOCKSIZE
        return offsets
    except (FileNotFoundError, tarfile.TarError) as error:
        raise UserError(
            f"{old}: is damaged or missing ({error}); nothing was changed. Put an intact copy there, or prepare the "
            "shards again without the patient."
        ) from None


def _move_row(row: Row, shard: str, offsets: Mapping[int, int]) -> Row:
    columns = {name: [offsets[n] for n in row[name]] for name in ("frame_offset", "mask_offset")}
    return {**row, **columns, "shard": shard, "json_offset": offsets.get(row["json_offset"], 0)}


def _remove_from_lists(folder: Path, patients: set[str]) -> None:
    """Remove the patients from `sources.json` and from the list of failed cases."""
    if (folder / SOURCES).is_file():
        states = {c: state for c, state in _read_json(folder / SOURCES).items() if state["patient"] not in patients}
        with atomic_write(folder / SOURCES, "w") as file:
            json.dump(states, file, indent=0, sort_keys=True)
    if (folder / FAILURES).is_file():
        lines = (folder / FAILURES).read_text().splitlines(keepends=True)
        with atomic_write(folder / FAILURES, "w") as file:
            file.writelines(line for line in lines if not any(patient in line for patient in patients))
