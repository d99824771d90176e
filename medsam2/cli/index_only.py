"""`medsam2 prepare --index-only`: an index for tars that are there already."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from medsam2.cases.settings import SettingsBook
    from medsam2.shards.foreign import Indexed, Skipped

SHOWN = 20


@dataclass(frozen=True)
class IndexFlags:
    """The flags of the command that hold for an index; `workers` 0 is one a core."""

    modality: str
    split: str
    split_file: Path | None
    seed: int
    workers: int
    strict: bool
    force: bool
    dry_run: bool


def refuse_flags(flags: Mapping[str, Any]) -> None:
    """Refuse what would change the tars.

    Args:
        flags: by name; None, False or an empty list where one was not given.

    Raises:
        UserError: one of them was given.
    """
    for name, value in flags.items():
        if value is not None and value is not False and value != []:  # 0 was given
            raise UserError(f"{name} does not go with --index-only, which changes no tar; leave it out.")


def run_index_only(source: str | None, out: str, book: SettingsBook, flags: IndexFlags, bar: Progress) -> None:
    """Index the tars in `source` and print what was found and what was skipped.

    Args:
        bar: not yet started; its tasks need `unit` and `failed`.

    Raises:
        UserError: see `index_tars`, or a setting that would change the tars.
    """
    from medsam2.cases.case import MODALITIES
    from medsam2.shards.foreign import IndexOptions, index_tars
    from medsam2.shards.split import parse_shares

    if source is None:
        raise UserError("SOURCE is missing: the folder or URL of the tars, e.g. `medsam2 prepare tars/ --index-only`")
    if flags.modality and flags.modality not in MODALITIES:
        hint = did_you_mean(flags.modality.upper(), MODALITIES)
        raise UserError(f"--modality {flags.modality!r} is not one of {', '.join(MODALITIES)}.{hint}")
    for name in {"common", *book.datasets}:
        rules = (book.common if name == "common" else book.of(name)).labels
        given = [key for key in ("merge", "keep", "drop", "instances") if getattr(rules, key)]
        if given:
            raise UserError(
                f"labels.{given[0]} does not go with --index-only, which changes no mask: only labels.rename does. "
                "Structures are chosen by name when you train."
            )
    options = IndexOptions(
        book=book,
        shares=parse_shares(flags.split),
        modality=flags.modality,
        split_file=flags.split_file,
        seed=flags.seed,
        workers=flags.workers or len(os.sched_getaffinity(0)),
        strict=flags.strict,
        force=flags.force,
        dry_run=flags.dry_run,
    )
    with bar:
        task = bar.add_task("indexing", total=None, failed=0, unit="tars")
        result = index_tars(
            source,
            out or source,
            options,
            lambda done, total, bad: bar.update(task, completed=done, total=total, failed=bad),
        )
    _report(result, flags.dry_run)


def _report(result: Indexed, dry_run: bool) -> None:
    from medsam2.cli.console import wide_console

    console = wide_console()
    for note in result.notes[:SHOWN]:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    _print_groups(console, result.summary)
    _print_skipped(console, result.skipped)
    for tar, reason in result.damaged[:SHOWN]:
        console.print(f"damaged: {tar}: {reason}", style="red", markup=False, highlight=False)
    if len(result.damaged) > SHOWN:
        console.print(f"... and {len(result.damaged) - SHOWN} more damaged tars.", style="red")
    for same in result.summary["duplicates_across_splits"][:SHOWN]:
        text = f"warning: the same pixels stand in two splits: cases {', '.join(same)}"
        console.print(text, style="yellow", highlight=False)
    shards = len(result.summary["shards"])
    counts = f"In the index: {result.samples:,} samples of {shards:,} tars"
    left = f"skipped: {len(result.skipped):,} samples; damaged: {len(result.damaged):,} tars."
    console.print(f"{counts}; {left}", highlight=False)
    if dry_run:
        console.print("Nothing was written (--dry-run).")
        return
    if not result.beside:
        console.print(f"Bring index.arrow and index.json of {result.where} and the tars into one place.", markup=False)
    console.print(
        f"Next: medsam2 inspect {result.where}\n"
        f"      python train.py experiment=quickstart data.shards={result.where} output=runs/first",
        markup=False,
        highlight=False,
    )


def _print_groups(console: Console, summary: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table("dataset", "modality", "split")
    for name in ("patients", "cases", "segments", "objects", "frames", "MB of tars"):
        table.add_column(name, justify="right")
    for group in summary["groups"]:
        numbers = [f"{group[name]:,}" for name in ("patients", "cases", "segments", "objects", "frames")]
        names = (group["dataset"], group["modality"], group["split"])
        table.add_row(*names, *numbers, f"{group['bytes'] / 1e6:,.1f}")
    console.print(table)


def _print_skipped(console: Console, skipped: tuple[Skipped, ...]) -> None:
    """How many samples each reason costs, with the first of them."""
    from rich.table import Table
    from rich.text import Text

    if not skipped:
        return
    reasons = Counter(entry.reason for entry in skipped)
    first: dict[str, Skipped] = {}
    for entry in skipped:
        first.setdefault(entry.reason, entry)
    table = Table("skipped because", "samples", "first")
    for reason, count in reasons.most_common(SHOWN):
        # names come out of the tars: they are shown as they are, not as markup
        table.add_row(Text(reason), f"{count:,}", Text(f"{first[reason].tar}: {first[reason].key}"))
    console.print(table)
    if len(reasons) > SHOWN:
        console.print(f"... and {len(reasons) - SHOWN} more reasons.")
