"""Several formats at once, a sub-folder each; and a release: all of them with card, licence, checksums and usage."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from medsam2.errors import UserError
from medsam2.export.card import card, describe_checks, licence
from medsam2.export.run import CARD, reference_clip, refuse_existing, refuse_nan, write_text
from medsam2.export.targets import ExportResult, find_target, targets
from medsam2.export.usage import usage_text
from medsam2.export.verify import ReferenceClip
from medsam2.files import new_folder, sync_folder
from medsam2.model.build import LoadedModel

ALL = "all"
SUMS, USAGE, LICENCE = "SHA256SUMS", "usage.md", "LICENSE"
ROOT = Path(__file__).resolve().parents[2]
OTHER_LICENCE = """The network and Meta's weights, from which this model comes, are under the Apache License 2.0, below.

These weights were also trained on data sets whose licences, or the lack of one, are stated in README.md under "Training
data". They decide who may use the weights for what; whoever passes them on has to settle that, and replace this note.

"""


def split_names(given: Sequence[str]) -> list[str]:
    """The formats of `--to A --to B` or `--to A,B`, each once; ["all"] for a release.

    Raises:
        UserError: an unknown format, or "all" beside others.
    """
    names = list(dict.fromkeys(name.strip() for part in given for name in part.split(",") if name.strip()))
    if ALL in names and len(names) > 1:
        raise UserError(f"--to all is every format; leave out {', '.join(name for name in names if name != ALL)}.")
    if names == [ALL]:
        return names
    return [find_target(name).name for name in names]


def release_names(loaded: LoadedModel) -> list[str]:
    """Every format that this checkpoint can be written in: `adapter` needs one."""
    return [name for name in targets() if name != "adapter" or loaded.metadata.get("adapter")]


def write_several(
    loaded: LoadedModel,
    names: Sequence[str],
    out: Path,
    force: bool = False,
    verify: bool = True,
    case: str | ReferenceClip | None = None,
    scores: Path | None = None,
    release: bool = False,
) -> list[ExportResult]:
    """Write each format into a sub-folder of `out`, all of them or none.

    Args:
        release: add README.md, LICENSE, usage.md and SHA256SUMS. The rest as of `run.write_export`.

    Raises:
        UserError: `out` is not empty (without `force`), or one format fails its check.
    """
    refuse_existing(out, force)
    refuse_nan(loaded)
    clip = reference_clip(case, loaded.spec.image_size) if verify else None
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        results = [
            find_target(name).exporter()(loaded, draft / name, verify=verify, case=clip, scores=scores)
            for name in names
        ]
        if release:
            _describe(draft, loaded, results, names, scores)
        new_folder(out, force)
        for path in sorted(draft.iterdir()):
            if (
                path.is_dir() and (out / path.name).is_dir()
            ):  # of an earlier export, with --force: a folder is one thing
                shutil.rmtree(out / path.name)
            os.replace(path, out / path.name)
        sync_folder(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [
        ExportResult(out / name, result.files, result.verified, result.report)
        for name, result in zip(names, results, strict=True)
    ]


def _describe(
    draft: Path, loaded: LoadedModel, results: Sequence[ExportResult], names: Sequence[str], scores: Path | None
) -> None:
    """The files of the release as a whole; the checksums last, over all the others."""
    whole = {f"{name}/": find_target(name).summary for name in names}
    whole |= {USAGE: "ten lines for each of them", LICENCE: "who may use it", SUMS: "`sha256sum -c SHA256SUMS`"}
    checks = describe_checks({name: result.report for name, result in zip(names, results, strict=True)})
    text = card("release", loaded, None, scores, files=whole, usage=f"See [{USAGE}]({USAGE}).", check=checks)
    write_text(draft / CARD, text)
    write_text(draft / LICENCE, licence_file(loaded))
    write_text(draft / USAGE, usage_text(loaded, names))
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    lines = [f"{digest(path)}  {path.relative_to(draft).as_posix()}\n" for path in files]
    write_text(draft / SUMS, "".join(lines))


def licence_file(loaded: LoadedModel) -> str:
    """The Apache License, behind a note where the training data do not allow it by themselves."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8") if (ROOT / "LICENSE").is_file() else None
    text = text or importlib.metadata.distribution("medsam2").read_text("licenses/LICENSE")
    if text is None:
        raise UserError("the licence file of medsam2 is missing from this installation; reinstall it.")
    return text if licence(loaded.metadata) == "apache-2.0" else OTHER_LICENCE + text


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
