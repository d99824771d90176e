"""The official SAM 2 format: `.pt` + self-contained yaml, which Meta's code and the tools built on it load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsam2.errors import UserError
from medsam2.export.card import official_card
from medsam2.export.expected import compared, items_of, refuse_other_masks, run_consumer, together
from medsam2.export.run import file_stem, primitives, write_export, write_text
from medsam2.export.targets import ExportResult
from medsam2.export.verify import AGREEMENT, ReferenceClip
from medsam2.files import atomic_write
from medsam2.model.build import LoadedModel, ModelSpec, model_config
from medsam2.pixels import normalise

TARGET = "sam2"  # official .pt and yaml for Meta's code and the tools built on it

CONSUMER = Path(__file__).with_name("official_consumer.py")
ADVICE = (
    "Is image_size the one that the checkpoint was trained with? If so, please report it with the run's config.yaml; "
    "--no-verify exports all the same."
)


def export(
    checkpoint: str | Path | LoadedModel,
    out: Path | str,
    force: bool = False,
    verify: bool = True,
    case: str | ReferenceClip | None = None,
    scores: Path | None = None,
) -> ExportResult:
    """Write `medsam2_{size}_{px}.pt`, the yaml of the same stem, README.md and verify.json into `out`.

    Raises:
        UserError: `out` is not empty (without `force`), the checkpoint does not load, or the check fails.
    """

    def describe(loaded: LoadedModel, found: Mapping[str, Any] | None) -> str:
        return official_card(file_stem(loaded), loaded, found, scores)

    return write_export(checkpoint, out, force, verify, case, scores, write_model, verify_official, describe)


def write_model(loaded: LoadedModel, folder: Path) -> None:
    stem = file_stem(loaded)
    _write_weights(folder / f"{stem}.pt", loaded)
    _write_config(folder / f"{stem}.yaml", loaded)


def verify_official(ours: LoadedModel, folder: Path, clip: ReferenceClip) -> dict[str, Any]:
    """Load the files of `folder` by Meta's code in a process of its own, run the clip with both, compare.

    Returns:
        JSON values of `expected.together`.

    Raises:
        UserError: Meta's code refuses the files, or the masks overlap less than `AGREEMENT`.
    """
    stem = file_stem(ours)
    items = items_of(ours, clip, torch.bfloat16)  # as the official predictor keeps its memories
    files = [folder / f"{stem}.yaml", folder / f"{stem}.pt"]
    try:
        answers = run_consumer(CONSUMER, files, items, shared_tensors(clip, ours.spec))
    except UserError as error:
        raise UserError(f"the official code does not load the export of {ours.source}: {error}") from None
    found = compared(items, answers, clip)
    refuse_other_masks(items, found, "the official predictor's", ours.source, ADVICE)
    loaded = "strictly, by sam2.build_sam of Meta's code in a process without medsam2"
    return {**together(items, found), "loaded": loaded, "tolerances": {"iou": AGREEMENT}}


def shared_tensors(clip: ReferenceClip, spec: ModelSpec) -> dict[str, Tensor]:
    """The very frames that our predictor sees [T, 3, S, S], so that ways of reading pictures do not enter."""
    return {"images": normalise(clip.frames, spec.image_size), "size": torch.tensor(clip.frames.shape[-2:])}


def _write_weights(path: Path, loaded: LoadedModel) -> None:
    """Under the key "model"; beside it plain values only, or no consumer can unpickle the file."""
    dtype = torch.bfloat16 if loaded.metadata.get("dtype") == "bf16" else torch.float32
    state = {key: value.detach().cpu().to(dtype).contiguous() for key, value in loaded.sam.state_dict().items()}
    with atomic_write(path) as file:
        torch.save({"model": state, "medsam2": primitives(loaded)}, file)


def _write_config(path: Path, loaded: LoadedModel) -> None:
    """The network's configuration under `model` at the root of Hydra's tree, as in the package's own yaml files."""
    import yaml

    text = yaml.safe_dump({"model": model_config(loaded.spec)}, sort_keys=False)
    write_text(
        path, f"# @package _global_\n# {loaded.spec.name} {loaded.spec.version}, {loaded.spec.image_size} px\n{text}"
    )
