"""Loads the checkpoints of an evaluation, with the metadata that their files record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from medsam2.evaluation.protocol.protocols import why_outside
from medsam2.evaluation.run.ranks import SINGLE_RANK, Rank
from medsam2.evaluation.settings import EvaluateSettings
from medsam2.inference.predictor import Predictor
from medsam2.model.build import LoadedModel, find_device, load_model
from medsam2.model.policies import make_policy
from medsam2.model.tracker import Tracker


@dataclass(frozen=True)
class CheckpointInfo:
    """The entry of a checkpoint in summary.json.

    Attributes:
        label: its name in tables. name: as in `checkpoint=`, without folders if absolute. model, image_size: its
            network. weights: sha256 (16 digits) of its tensors, independent of the file's path.
        records_cases: whether it records its training images; otherwise a leak cannot be detected.
        outside: protocol name -> why the checkpoint was not trained with such prompts; only if it records its training.
    """

    label: str
    name: str
    model: str
    image_size: int
    weights: str
    records_cases: bool
    outside: dict[str, str]


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """A checkpoint ready to predict. trained_on: content hashes of its training images."""

    info: CheckpointInfo
    predictor: Predictor
    trained_on: frozenset[str]


def load_checkpoints(settings: EvaluateSettings, rank: Rank = SINGLE_RANK) -> list[LoadedCheckpoint]:
    """Load all checkpoints onto the device of this rank.

    Raises:
        UserError: no such checkpoint or device.
    """
    device = find_device(settings.device, rank.local_index if rank.count > 1 else None)
    precision = torch.bfloat16 if settings.precision == "bf16" else None
    checkpoints = []
    labels = settings.labels or short_names(settings.checkpoints)
    for label, name in zip(labels, settings.checkpoints, strict=True):
        loaded = load_model(name)
        info = _read_info(label, name, loaded, settings)
        tracker = Tracker(loaded.sam, make_policy(settings.memory, loaded.sam)).eval().to(device)
        predictor = Predictor(tracker, settings.batch_frames, autocast=precision, compile=settings.compile)
        checkpoints.append(LoadedCheckpoint(info, predictor, frozenset(loaded.provenance.content_hashes)))
    return checkpoints


def _read_info(label: str, name: str, loaded: LoadedModel, settings: EvaluateSettings) -> CheckpointInfo:
    reasons = {protocol.name: why_outside(protocol, loaded.provenance) for protocol in settings.all_protocols}
    return CheckpointInfo(
        label=label,
        name=Path(name).name if Path(name).is_absolute() else name,
        model=f"{loaded.spec.name} {loaded.spec.version}",
        image_size=loaded.spec.image_size,
        weights=weights_hash(loaded.sam.state_dict().items()),
        records_cases=bool(loaded.provenance.content_hashes),
        outside={protocol: why for protocol, why in reasons.items() if why},
    )


def weights_hash(state: Iterable[tuple[str, torch.Tensor]]) -> str:
    """16 hexadecimal digits of the sha256 of named tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key, value in sorted(state):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def short_names(checkpoints: tuple[str, ...]) -> tuple[str, ...]:
    """Make labels for tables: the name of the run folder, else the file's stem; equal labels get a number."""
    names = []
    for path in map(Path, checkpoints):
        run = path.parent.parent.name if path.parent.name == "checkpoints" else ""
        names.append(run or (path.stem if path.suffix else path.name))
    return tuple(
        name if names.count(name) == 1 else f"{name}-{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    )
