"""Export a model: every format is built in a draft, proves itself there, and is moved to its place at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsam2.errors import UserError
from medsam2.export.card.card import model_card, read_scores
from medsam2.export.formats.exporter import Exporter
from medsam2.export.release import write_release
from medsam2.export.targets import ALL, TARGETS, split_names
from medsam2.export.verify.clip import ReferenceClip, reference_clip
from medsam2.export.verify.run import agreement, verify_export
from medsam2.files import new_folder, sync_folder, try_lock, write_text
from medsam2.model.build import LoadedModel, load_model

VERIFY, CARD = "verify.json", "README.md"


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote in one format.

    Attributes:
        folder: where; files: names in it.
        verified: the consumer's own code gave our masks (False: it was not asked to).
        report: what the verification measured, JSON values.
    """

    folder: Path
    files: tuple[str, ...]
    verified: bool
    report: Mapping[str, Any]

    def lines(self) -> list[str]:
        """Return the lines that the command prints."""
        written = f"wrote {', '.join(self.files)} to {self.folder}"
        return [written, agreement(self.report)] if self.verified else [written]


def export_model(
    checkpoint: str | Path | LoadedModel,
    names: str | Sequence[str],
    out: Path | str,
    *,
    force: bool = False,
    verify: bool = True,
    case: str | ReferenceClip | None = None,
    scores: Path | None = None,
) -> list[ExportResult]:
    """Write a model in one format into `out`, in several into a sub-folder each, or all of them as a release.

    Everything is written beside `out` first and moved there at the end: a failed export leaves nothing, and with
    `force` the files of an earlier one stay until then.

    Args:
        checkpoint: whatever `load_model` reads, or a network that was loaded already.
        names: of the formats (`TARGETS`), or "all".
        verify: whether each format's consumer must give our masks.
        case: what both are run on: SHARDS, SHARDS:KEY or a clip; None generates one.
        scores: an evaluation folder of these weights, for the card.

    Raises:
        UserError: `out` is not empty (without `force`), the checkpoint does not load, the scores are of other weights,
            or one format fails.
    """
    out, names = Path(out), split_names([names] if isinstance(names, str) else names)
    refuse_existing(out, force)
    model = checkpoint if isinstance(checkpoint, LoadedModel) else load_model(checkpoint)
    read_scores(model, scores)  # refused before the check, which takes a while
    release = names == [ALL]
    exporters = {name: TARGETS[name].exporter() for name in (TARGETS if release else names)}
    if release:
        exporters = {name: exporter for name, exporter in exporters.items() if exporter.supports(model)}
    clip = reference_clip(case, model.spec.image_size) if verify else None
    with draft_folder(out) as draft:
        places = {name: Path(name) if release or len(exporters) > 1 else Path() for name in exporters}
        results = []
        for name, exporter in exporters.items():
            report = write_format(name, exporter, model, draft / places[name], clip, scores)
            files = tuple(sorted(path.name for path in (draft / places[name]).iterdir()))
            results.append(ExportResult(out / places[name], files, verify, report))
        if release:
            reports = {name: result.report for name, result in zip(exporters, results, strict=True)}
            write_release(draft, model, exporters, reports, scores)
        publish(draft, out, force)
    return results


def write_format(
    name: str, exporter: Exporter, model: LoadedModel, folder: Path, clip: ReferenceClip | None, scores: Path | None
) -> dict[str, Any]:
    """Build one format, let it prove itself, and write verify.json and README.md beside its files.

    Args:
        clip: what it is compared on; None leaves the check out.

    Returns:
        What stands in verify.json.

    Raises:
        UserError: the format cannot be built, or its consumer gives other masks.
    """
    folder.mkdir(exist_ok=True)
    exporter.build(model, folder)
    report: dict[str, Any] = {"verified": False}
    if clip is not None:
        # Inside the draft, so that nothing of a case stays elsewhere when the process is killed.
        with tempfile.TemporaryDirectory(prefix=".scratch.", dir=folder) as scratch:
            consumer = exporter.load_as_consumer(model, folder, Path(scratch))
            report = {"verified": True, **verify_export(consumer, model, clip, Path(scratch))}
    write_text(folder / VERIFY, json.dumps(report, indent=2) + "\n")
    write_text(folder / CARD, model_card(model, folder, {name: exporter}, {name: report}, scores))
    return report


def refuse_existing(out: Path, force: bool) -> None:
    """Refuse a folder that is not empty, before the work."""
    if out.is_file():
        raise UserError(f"--out {out} is a file; give a folder that does not exist yet.")
    if not force and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} already exists and is not empty; give another folder, or --force to replace.")


@contextlib.contextmanager
def draft_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that is removed at the end.

    Drafts of processes that were killed are removed too: the lock of a draft ends with its process.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{out.name}.*.partial"):
        with try_lock(stale) as free:
            if free:
                shutil.rmtree(stale, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        with try_lock(draft):
            yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, out: Path, force: bool) -> None:
    """Move what is in `draft` into `out`, after its bytes are on the disk."""
    for path in draft.rglob("*"):
        sync_folder(path)  # it serves files too
    new_folder(out, force)
    for path in sorted(draft.iterdir()):
        if path.is_dir() and (out / path.name).is_dir():  # of an earlier export: a folder is one thing
            shutil.rmtree(out / path.name)
        os.replace(path, out / path.name)
    sync_folder(out)
