"""An index for tars that are there already: those of other WebDataset tools, and our own whose index was lost.

No tar is changed. Each is scanned once, several at a time; then cases get their salted names and splits, and the index
is written, whole or not at all. docs/foreign.md says what a tar may hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from medsam2 import __version__
from medsam2.cases.settings import SettingsBook
from medsam2.errors import UserError
from medsam2.shards.folder import Output
from medsam2.shards.foreign_frames import SkippedError
from medsam2.shards.foreign_names import Named, name_rows
from medsam2.shards.foreign_sample import Found, Reading, names_in, rows_of
from medsam2.shards.foreign_tar import DamagedTarError, read_samples
from medsam2.shards.index import ARROW, JSON, write_index
from medsam2.shards.pool import open_workers, run_all, useful_workers
from medsam2.shards.publish import publish
from medsam2.shards.summary import summarise
from medsam2.shards.target import Target, open_target

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LAYOUT = "webdataset"


@dataclass(frozen=True)
class IndexOptions:
    """What decides the index.

    Attributes:
        modality: of all foreign samples, whatever their json says. shares, split_file, seed: of samples whose split
            neither their json nor the tar's name says. strict: skip nothing. force: replace an index.
        workers: most processes, one tar each.
    """

    book: SettingsBook
    shares: dict[str, float]
    modality: str = ""
    split_file: Path | None = None
    seed: int = 0
    workers: int = 1
    strict: bool = False
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Skipped:
    """A sample that is not in the index, and why."""

    tar: str
    key: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """What a tar holds. damage: why it could not be read to its end, or empty."""

    tar: str
    found: tuple[Found, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    damage: str = ""
    size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Indexed:
    """What came out.

    Attributes:
        where: the folder or URL of the index. summary: the content of `index.json`. samples: in the index.
        damaged: (tar, reason). notes: what the user should know of splits and names.
        beside: the tars (or links to them) stand beside the index; else they are still to be brought together.
    """

    where: str
    summary: dict[str, Any]
    samples: int
    skipped: tuple[Skipped, ...]
    damaged: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    beside: bool


Progress = Callable[[int, int, int], None]
"""Called with (tars done, of, samples that were skipped)."""


def index_tars(
    source: str | Path, out: str | Path, options: IndexOptions, progress: Progress = lambda *_: None
) -> Indexed:
    """Write `index.arrow` and `index.json` for the tars in `source` (a folder or an fsspec URL) to `out`.

    Raises:
        UserError: no tar, an index that is there already (without `force`), a modality that nobody says, or no sample
            that can be used.
    """
    tars, target = open_target(source), open_target(out)
    names = _tars(tars)
    there = {ARROW, JSON} & set(target.names())
    if there and not (options.force or options.dry_run):
        raise UserError(
            f"{target.where}/{min(there)}: already exists; give --force to replace the index, or another --out."
        )
    before = _before(target) if JSON in there else {}
    retired = set(before.get("retired_shards", ()))
    names = [name for name in names if name not in retired]
    scans = _scans(names, tars, options, progress)
    named = name_rows([(scan.tar, found) for scan in scans for found in scan.found], options, before)
    skipped = [entry for scan in scans for entry in scan.skipped]
    skipped += [Skipped(tar, key, reason) for tar, key, reason in named.skipped]
    damaged = tuple((scan.tar, scan.damage) for scan in scans if scan.damage)
    _refuse(tars.where, len(names), named, skipped, damaged, options.strict)
    live = {row["shard"] for row in named.rows}
    shards = {scan.tar: {"bytes": scan.size, "sha256": scan.sha256} for scan in scans if scan.tar in live}
    summary = _summary(shards, named, options, before, len(skipped))
    if not options.dry_run:
        with _told(target.where):
            _link(tars, target, sorted(live))
            _write(target, named.rows, summary)
    beside = tars.where == target.where or (tars.local is not None and target.local is not None)
    return Indexed(target.where, summary, named.samples, tuple(skipped), damaged, named.notes, beside)


def scan_tar(name: str, where: str, book: SettingsBook, modality: str) -> Scan:
    """The rows of one tar in the folder or URL `where`, with offsets; damage and odd samples are reported, not raised.

    Raises:
        UserError: nobody says the modality.
    """
    if not name.isprintable() or "\\" in name:
        return Scan(name, damage="its name has characters that readers refuse; give it another one")
    tars = open_target(where)
    if tars.local is not None:
        return _scan(tars.local / name, name, where, book, modality)
    with tempfile.TemporaryDirectory(prefix="medsam2-") as folder:
        path = Path(folder) / "scanned.tar"
        try:
            tars.copy_to(name, path)
        except Exception as error:  # each protocol has exceptions of its own
            return Scan(name, damage=f"could not be fetched ({type(error).__name__}: {error})")
        return _scan(path, name, where, book, modality)


def _scan(path: Path, name: str, where: str, book: SettingsBook, modality: str) -> Scan:
    dataset, split = names_in(name.removesuffix(".tar"))
    folder = where.rstrip("/").rsplit("/", 1)[-1] if "://" in where else Path(where).resolve().name
    reading = Reading(name, book, modality, dataset or folder, split)
    found: list[Found] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    damage = ""
    try:
        with open(path, "rb") as file:
            try:
                for sample in read_samples(path):
                    try:
                        if sample.key in seen:
                            raise SkippedError("its key stands in the same tar before")
                        seen.add(sample.key)
                        found += rows_of(file, sample, reading)
                    except SkippedError as error:
                        skipped.append(Skipped(name, sample.key, str(error)))
                    except (MemoryError, ArithmeticError, TypeError, IndexError, KeyError) as error:
                        # one odd file must not end the run of a thousand
                        skipped.append(Skipped(name, sample.key, f"{type(error).__name__} (not foreseen)"))
            except DamagedTarError as error:
                damage = str(error)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest() if found else ""
            return Scan(name, tuple(found), tuple(skipped), damage, path.stat().st_size, digest)
    except OSError as error:
        return Scan(name, damage=f"not readable ({error.strerror or error})")


def _tars(tars: Target) -> list[str]:
    """Names of the tars.

    Raises:
        UserError: there is none.
    """
    there = tars.names()
    names = [name for name in there if name.endswith(".tar") and not name.startswith(".")]
    if not names:
        packed = next((name for name in there if name.endswith(COMPRESSED)), "")
        hint = f" {packed} is compressed and cannot be read by offset: unpack it to a plain .tar." if packed else ""
        raise UserError(f"{tars.where}: holds no .tar file; give the folder or URL in which the shards lie.{hint}")
    return names


def _before(target: Target) -> dict[str, Any]:
    """The `index.json` that is replaced: what only it knows (configuration, who was taken out) is kept."""
    try:
        found = json.loads(target.read(JSON))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _scans(names: Sequence[str], tars: Target, options: IndexOptions, progress: Progress) -> list[Scan]:
    """All tars in the order of their names. What is at a URL is fetched one after the other."""
    local = tars.local
    count = 0 if local is None else useful_workers([[local / name] for name in names], options.workers)
    function = partial(scan_tar, where=tars.where, book=options.book, modality=options.modality)
    scans: dict[str, Scan] = {}
    skipped = 0
    progress(0, len(names), 0)
    with open_workers(count) as workers:
        for name, scan in run_all(function, names, workers):
            scans[name] = scan or Scan(name, damage="the process reading it was killed; it needs more memory")
            skipped += len(scans[name].skipped)
            progress(len(scans), len(names), skipped)
    return [scans[name] for name in names]


def _refuse(
    where: str, tars: int, named: Named, skipped: Sequence[Skipped], damaged: Sequence[tuple[str, str]], strict: bool
) -> None:
    first = ""
    if damaged:
        first = f"{damaged[0][0]}: {damaged[0][1]}"
    elif skipped:
        first = f"{skipped[0].tar}: sample {skipped[0].key!r}: {skipped[0].reason}"
    if not named.rows:
        raise UserError(
            f"{where}: none of {tars} tars has a sample that can be used; first: {first or 'no sample at all'}. "
            "docs/foreign.md says how members are to be named."
        )
    if strict and first:
        raise UserError(f"{where}: {first} (stopped by --strict; nothing was written)")


def _link(tars: Target, target: Target, names: Sequence[str]) -> None:
    """Links to local tars beside a local index elsewhere: an index names tars of its own folder alone.

    Raises:
        UserError: another file has the name of a tar.
    """
    if tars.local is None or target.local is None or tars.local.resolve() == target.local.resolve():
        return
    target.local.mkdir(parents=True, exist_ok=True)
    for name in names:
        link, tar = target.local / name, (tars.local / name).resolve()
        if link.resolve() == tar:
            continue
        if link.is_symlink() or link.exists():
            raise UserError(f"{link}: is another file than {tars.local / name}; choose another --out.")
        link.symlink_to(os.path.relpath(tar, target.local.resolve()))


def _summary(
    shards: dict[str, dict[str, Any]],
    named: Named,
    options: IndexOptions,
    before: dict[str, Any],
    skipped: int,
) -> dict[str, Any]:
    """`index.json`, with what an earlier one alone knows."""
    split: Any = options.shares
    if options.split_file:  # it was read before, so it is there
        split = "file sha256 " + hashlib.sha256(options.split_file.read_bytes()).hexdigest()
    configuration = before.get("configuration") if not named.foreign else None
    if not isinstance(configuration, dict):
        configuration = {
            "index_only": True,
            "version": __version__,
            "modality": options.modality,
            "split": split,
            "seed": options.seed,
            "settings": options.book.model_dump(mode="json", exclude_unset=True),
        }
    provenance = dict(before.get("datasets", {}))
    for dataset, name in named.foreign.items():
        settings = options.book.of(name)
        provenance[dataset] = {"source": settings.source, "licence": settings.licence, "layout": LAYOUT}
    removed, moved = before.get("removed_patients", ()), before.get("moved_patients", ())
    summary = summarise(named.rows, shards, configuration, skipped, provenance, removed, moved)
    return {**{key: value for key, value in before.items() if key not in summary}, **summary}


def _write(target: Target, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    if target.local is not None:
        target.local.mkdir(parents=True, exist_ok=True)
        write_index(target.local, rows, summary)
        return
    with tempfile.TemporaryDirectory(prefix="medsam2-") as folder:
        publish(Output(target, Path(folder)), rows, summary)


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{where}: the index cannot be written ({error.strerror or error}); mend that, or give another --out."
        ) from None
