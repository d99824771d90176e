"""What every exporter shares: a draft beside the target, the check, the card, and the one rename at the end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from medsam2 import __version__
from medsam2.errors import UserError
from medsam2.export.card_scores import scores_section
from medsam2.export.targets import ExportResult
from medsam2.export.verify import ReferenceClip, clip_of_case, generated_clip
from medsam2.files import atomic_write, file_name, new_folder, sync_folder
from medsam2.model.build import LoadedModel, load_model

VERIFY, CARD = "verify.json", "README.md"
LARGE = 512  # px

Build = Callable[[LoadedModel, Path], None]
Check = Callable[[LoadedModel, Path, ReferenceClip], Mapping[str, Any]]
Describe = Callable[[LoadedModel, Mapping[str, Any] | None], str]


def write_export(
    checkpoint: str | Path | LoadedModel,
    out: Path | str,
    force: bool,
    verify: bool,
    case: str | ReferenceClip | None,
    scores: Path | None,
    build: Build,
    check: Check,
    describe: Describe,
) -> ExportResult:
    """Write a model as a folder whose files have been proved, or nothing.

    Args:
        checkpoint: whatever `load_model` reads, or a network that was loaded already (`variants.load_variant`).
        case: what both sides are run on: SHARDS, SHARDS:KEY or a clip; None generates one.
        scores: an evaluation folder of these weights, for the card; that of others is refused before the check, which
            takes a while.
        build: writes the format's files into the draft folder.
        check: loads them as their consumer does, compares, and gives what it measured as JSON values; raises
            `UserError` where masks differ.
        describe: the text of README.md, from what `check` gave (None: not asked to).

    Raises:
        UserError: `out` is not empty (without `force`), the checkpoint does not load, the scores are of other weights,
            or the check fails.
    """
    refuse_existing(Path(out), force)
    loaded = checkpoint if isinstance(checkpoint, LoadedModel) else load_model(checkpoint)
    refuse_nan(loaded)
    scores_section(loaded, scores)

    def proved(draft: Path) -> Mapping[str, Any]:
        return check(loaded, draft, reference_clip(case, loaded.spec.image_size))

    return write_folder(Path(out), force, partial(build, loaded), proved if verify else None, partial(describe, loaded))


def write_folder(
    out: Path,
    force: bool,
    build: Callable[[Path], object],
    check: Callable[[Path], Mapping[str, Any]] | None,
    describe: Callable[[Mapping[str, Any] | None], str],
) -> ExportResult:
    """`build`'s files, verify.json with what `check` gives, and README.md of `describe`, once `check` has passed.

    Everything is written beside `out` first and moved there at the end: a failed export leaves nothing, and with
    `force` the files of an earlier one stay until then. Callers look at `out` before they work (`refuse_existing`).

    Raises:
        UserError: `out` is not empty (without `force`), or what the three raise.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        build(draft)
        found = check(draft) if check else None
        report = {"verified": check is not None, **(found or {})}
        write_text(draft / VERIFY, json.dumps(report, indent=2) + "\n")
        write_text(draft / CARD, describe(found))
        files = tuple(sorted(path.name for path in draft.iterdir()))
        new_folder(out, force)
        for name in files:
            sync_file(draft / name)
            os.replace(draft / name, out / name)
        sync_folder(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return ExportResult(out, files, check is not None, report)


def reference_clip(case: str | ReferenceClip | None, side: int) -> ReferenceClip:
    """The clip that `case` names; None generates one, shorter for models of a large side, which are slow on a CPU."""
    if isinstance(case, ReferenceClip):
        return case
    return clip_of_case(case) if case else generated_clip(length=10 if side <= LARGE else 5)


def file_stem(loaded: LoadedModel) -> str:
    """`medsam2_tiny_512`: no dots, since some consumers cut the name at the first one."""
    return f"medsam2_{loaded.spec.name.removeprefix('hiera_')}_{loaded.spec.image_size}"


def primitives(loaded: LoadedModel) -> dict[str, Any]:
    """What the checkpoint says about itself, as strings, numbers, lists and dictionaries; no paths of its machine."""
    said = {**loaded.metadata, "spec": loaded.spec.to_dict(), "exported_by": f"medsam2 {__version__}"}
    if "start" in said:
        said["start"] = file_name(str(said["start"]))
    plain: dict[str, Any] = json.loads(json.dumps(said, default=str))
    return plain


def refuse_existing(out: Path, force: bool) -> None:
    """Before the work, not after it."""
    if out.is_file():
        raise UserError(f"--out {out} is a file; give a folder that does not exist yet.")
    if not force and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} already exists and is not empty; give another folder, or --force to replace.")


def refuse_nan(loaded: LoadedModel) -> None:
    for key, value in loaded.sam.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{loaded.source}: {key} has values that are not finite, so the training diverged; export an earlier "
                "checkpoint (checkpoints/previous.ckpt), and lower optim.lr."
            )


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def sync_file(path: Path) -> None:
    """Bytes that another library wrote are on the disk before the rename is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
