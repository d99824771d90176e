"""The checkpoints of an evaluation, each ready to predict and with what its file says about itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from medsam2.errors import UserError, did_you_mean
from medsam2.evaluation.protocol.protocols import why_outside
from medsam2.evaluation.run.ranks import ALONE, Rank
from medsam2.evaluation.settings import EvaluateSettings
from medsam2.inference.predictor import Predictor
from medsam2.model.build import LoadedModel, load_model
from medsam2.model.policies import make_policy
from medsam2.model.tracker import Tracker


@dataclass(frozen=True)
class CheckpointNote:
    """What stands of a checkpoint in summary.json.

    Attributes:
        label: in tables. name: as given. model, image_size: its network. weights: sha256 (16 digits) of its tensors,
            wherever the file lies. records_cases: whether it says which images it was trained on; where it does not, a
            leak cannot be seen. outside: why a protocol (by name) prompts in a way that it was not trained with; only
            where it records how it was trained.
    """

    label: str
    name: str
    model: str
    image_size: int
    weights: str
    records_cases: bool
    outside: dict[str, str]


@dataclass(frozen=True, eq=False)
class Contestant:
    """A checkpoint that predicts, and the content hashes of the images that it was trained on."""

    note: CheckpointNote
    predictor: Predictor
    trained_on: frozenset[str]


def load_contestants(settings: EvaluateSettings, rank: Rank = ALONE) -> list[Contestant]:
    """All checkpoints on the device of this rank.

    Raises:
        UserError: no such checkpoint or device, or labels that do not fit.
    """
    device = find_device(settings.device, rank)
    precision = torch.bfloat16 if settings.precision == "bf16" else None
    contestants = []
    labels = settings.labels or short_names(settings.checkpoints)
    for label, name in zip(labels, settings.checkpoints, strict=True):
        loaded = load_model(name)
        note = _note(label, name, loaded, settings)
        tracker = Tracker(loaded.sam, make_policy(settings.memory, loaded.sam)).eval().to(device)
        predictor = Predictor(tracker, settings.batch_frames, autocast=precision, compile=settings.compile)
        contestants.append(Contestant(note, predictor, frozenset(loaded.provenance.content_hashes)))
    return contestants


def _note(label: str, name: str, loaded: LoadedModel, settings: EvaluateSettings) -> CheckpointNote:
    reasons = {protocol.name: why_outside(protocol, loaded.provenance) for protocol in settings.all_protocols}
    return CheckpointNote(
        label=label,
        name=Path(name).name if Path(name).is_absolute() else name,
        model=f"{loaded.spec.name} {loaded.spec.version}",
        image_size=loaded.spec.image_size,
        weights=weights_hash(loaded.sam.state_dict().items()),
        records_cases=bool(loaded.provenance.content_hashes),
        outside={protocol: why for protocol, why in reasons.items() if why},
    )


def weights_hash(state: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(state):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def short_names(checkpoints: tuple[str, ...]) -> tuple[str, ...]:
    """Labels for tables: the run's folder where a checkpoint lies in one, else the file's stem; numbered if equal."""
    names = []
    for path in map(Path, checkpoints):
        run = path.parent.parent.name if path.parent.name == "checkpoints" else ""
        names.append(run or (path.stem if path.suffix else path.name))
    return tuple(
        name if names.count(name) == 1 else f"{name}-{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    )


def find_device(name: str, rank: Rank = ALONE) -> torch.device:
    """The device of `device=NAME`: with several ranks on a machine, `auto` and `cuda` deal its GPUs out in turn.

    Raises:
        UserError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = did_you_mean(name, ["auto", "cpu", "cuda"])
        raise UserError(f"device={name}: give auto, cpu, cuda or cuda:N.{hint}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: this machine has no CUDA device; give device=cpu.")
    if device.type == "cuda" and device.index is None and rank.count > 1:
        return torch.device("cuda", rank.local % torch.cuda.device_count())
    return device
