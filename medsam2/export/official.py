"""The official SAM 2 format: `.pt` + self-contained yaml, which Meta's code and the tools built on it load."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from medsam2 import __version__
from medsam2.errors import UserError
from medsam2.export.card import official_card
from medsam2.export.targets import ExportResult
from medsam2.export.verify import ReferenceClip, Verification, clip_of_case, generated_clip, verify_official
from medsam2.files import atomic_write, new_folder, sync_folder
from medsam2.model.build import LoadedModel, load_model, model_config

TARGET = "sam2"  # official .pt and yaml for Meta's code and the tools built on it


def export(
    checkpoint: str, out: Path, force: bool = False, verify: bool = True, case: str | None = None
) -> ExportResult:
    """`export_official` under the name that `targets.py` looks for."""
    return export_official(checkpoint, out, force, verify, clip_of_case(case) if case else None)


def export_official(
    checkpoint: str | Path, out: Path | str, force: bool = False, verify: bool = True, clip: ReferenceClip | None = None
) -> ExportResult:
    """Write `medsam2_{size}_{px}.pt`, the yaml of the same stem, README.md and verify.json into `out`.

    Everything is written beside `out` first and moved there once Meta's code has loaded it and given our masks: a
    failed export leaves nothing, and with `force` the files of an earlier one stay until then.

    Args:
        checkpoint: whatever `load_model` reads.
        clip: what both predictors are run on; a generated one by default.

    Raises:
        UserError: `out` is not empty (without `force`), the checkpoint does not load, or the check fails.
    """
    out = Path(out)
    _refuse_existing(out, force)
    loaded = load_model(checkpoint)
    _refuse_nan(loaded)
    stem = file_stem(loaded)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        _write_weights(draft / f"{stem}.pt", loaded)
        _write_config(draft / f"{stem}.yaml", loaded)
        check: Verification | None = None
        if verify:
            check = verify_official(draft / f"{stem}.yaml", draft / f"{stem}.pt", loaded, clip or generated_clip())
        report = {"verified": verify, **(check.to_dict() if check else {})}
        _write_text(draft / "verify.json", json.dumps(report, indent=2) + "\n")
        _write_text(draft / "README.md", official_card(stem, loaded, check))
        files = tuple(sorted(path.name for path in draft.iterdir()))
        new_folder(out, force)
        for name in files:
            os.replace(draft / name, out / name)
        sync_folder(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return ExportResult(out, files, verify, report)


def file_stem(loaded: LoadedModel) -> str:
    """`medsam2_tiny_512`: no dots, since some consumers cut the name at the first one."""
    return f"medsam2_{loaded.spec.name.removeprefix('hiera_')}_{loaded.spec.image_size}"


def _refuse_existing(out: Path, force: bool) -> None:
    if out.is_file():
        raise UserError(f"--out {out} is a file; give a folder that does not exist yet.")
    if not force and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} already exists and is not empty; give another folder, or --force to replace.")


def _refuse_nan(loaded: LoadedModel) -> None:
    for key, value in loaded.sam.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{loaded.source}: {key} has values that are not finite, so the training diverged; export an earlier "
                "checkpoint (checkpoints/previous.ckpt), and lower optim.lr."
            )


def _write_weights(path: Path, loaded: LoadedModel) -> None:
    """float32 under the key "model"; beside it plain values only, or no consumer can unpickle the file."""
    state = {key: value.detach().cpu().float().contiguous() for key, value in loaded.sam.state_dict().items()}
    with atomic_write(path) as file:
        torch.save({"model": state, "medsam2": primitives(loaded)}, file)


def primitives(loaded: LoadedModel) -> dict[str, Any]:
    """What the checkpoint says about itself, as strings, numbers, lists and dictionaries."""
    said = {**loaded.metadata, "spec": loaded.spec.to_dict(), "exported_by": f"medsam2 {__version__}"}
    plain: dict[str, Any] = json.loads(json.dumps(said, default=str))
    return plain


def _write_config(path: Path, loaded: LoadedModel) -> None:
    """The network's configuration under `model` at the root of Hydra's tree, as in the package's own yaml files."""
    import yaml

    text = yaml.safe_dump({"model": model_config(loaded.spec)}, sort_keys=False)
    _write_text(
        path, f"# @package _global_\n# {loaded.spec.name} {loaded.spec.version}, {loaded.spec.image_size} px\n{text}"
    )


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))
