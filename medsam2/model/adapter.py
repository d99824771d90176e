"""An adapter on disk: peft's two files, and a third that names the weights it belongs to.

    adapter_config.json           peft's configuration
    adapter_model.safetensors     the adapter's weights, and those of SAM 2 that were trained in full (megabytes)
    medsam2.json                  `AdapterRecord`: the base by the digest of its tensors, what was trained on what

An adapter on other weights than its own gives masks that are wrong without looking wrong; `load_adapter` refuses that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from medsam2.errors import UserError
from medsam2.files import atomic_write
from medsam2.model.adaptation import AdaptationSettings, apply_adaptation
from medsam2.model.lora import (
    adapter_state,
    base_state,
    has_adapter,
    is_adapted,
    load_adapter_state,
    merge,
    peft_config,
)
from medsam2.model.sizes import NANO_ASSET, ModelSpec

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "medsam2.json"
PEFT_PREFIX = "base_model.model."  # where a `peft.PeftModel` keeps the network that it wraps


class BaseRecord(BaseModel):
    """The weights under an adapter: file name without its folder, and digest of the tensors (`tensor_digest`)."""

    model_config = ConfigDict(frozen=True)

    file: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class AdapterRecord(BaseModel):
    """What an adapter says about itself.

    Attributes:
        spec: the network (`ModelSpec.to_dict`).
        adaptation: what was trained, from which the adapter is built again.
        content_hashes: of the training cases, so that evaluation can tell a leak; datasets: their source and licence.
        step: the optimiser step that it was saved at.
    """

    model_config = ConfigDict(frozen=True)

    base: BaseRecord
    spec: dict[str, Any]
    adaptation: AdaptationSettings
    content_hashes: tuple[str, ...] = ()
    datasets: dict[str, dict[str, str]] = Field(default_factory=dict)
    step: int = 0

    def metadata(self) -> dict[str, Any]:
        """What a model that is merged from it says about itself (`LoadedModel.metadata`)."""
        return self.model_dump(mode="json", include={"spec", "content_hashes", "datasets", "step"})


def tensor_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and float32 values: equal for equal weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().float().contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- in a run's checkpoints


def adapter_provenance(sam: nn.Module, settings: AdaptationSettings, source: str) -> dict[str, Any]:
    """What a checkpoint must say so that it can be merged or stripped later; {} where nothing is adapted.

    Call it before the first optimiser step: the digest is of the weights that the run starts from.

    Args:
        source: where these came from; only the file's name is kept.
    """
    if settings.peft is None:
        return {}
    base = BaseRecord(file=Path(source).name, sha256=tensor_digest(base_state(sam)))
    return {"adapter": {"base": base.model_dump(), "adaptation": settings.model_dump(mode="json")}}


def restore_adapted(sam: nn.Module, state: Mapping[str, Tensor], metadata: Mapping[str, Any], source: str) -> None:
    """Adapt `sam`, a plain network, as the checkpoint's run did, and load `state`; what was trained is trainable.

    Raises:
        UserError: the checkpoint does not say how it was adapted, or its keys do not fit.
    """
    said = metadata.get("adapter")
    if not said:
        raise UserError(f"{source} has an adapter but does not say which; give the folder of its run, or an export.")
    apply_adaptation(sam, AdaptationSettings.model_validate(said["adaptation"]))
    own = sam.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
    if wrong:
        raise UserError(f"{source} does not fit its own adapter settings: {', '.join(wrong[:3])} ({len(wrong)} keys).")
    sam.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()})


def load_merged(sam: nn.Module, state: Mapping[str, Tensor], metadata: Mapping[str, Any], source: str) -> bool:
    """Fill the plain network `sam` from a checkpoint with an adapter and merge it; False: `state` has none."""
    if not is_adapted(state):
        return False
    restore_adapted(sam, state, metadata, source)
    merge(sam)
    sam.requires_grad_(True)
    return True


# ------------------------------------------------------------------------------------------- in its own folder


def save_adapter(folder: Path, sam: nn.Module, record: AdapterRecord) -> tuple[str, ...]:
    """Write the adapter of `sam` into an existing folder; returns the files' names.

    Raises:
        UserError: `sam` has no adapter.
    """
    from safetensors.torch import save

    if not has_adapter(sam) or record.adaptation.peft is None:
        raise UserError("the model has no adapter to save.")
    tensors = {PEFT_PREFIX + name: value for name, value in adapter_state(sam).items()}
    config = peft_config(record.adaptation.peft, inference=True).to_dict()
    _write(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    _write(folder / CONFIG, json.dumps(plain, indent=2, sort_keys=True, default=str).encode() + b"\n")
    _write(folder / RECORD, record.model_dump_json(indent=2).encode() + b"\n")
    return (CONFIG, WEIGHTS, RECORD)


def is_adapter_folder(path: Path) -> bool:
    """Whether `path` is a folder with an adapter (of ours or of peft's) in it."""
    return (path / CONFIG).is_file()


def read_record(folder: Path) -> AdapterRecord:
    """What the adapter in `folder` says about itself.

    Raises:
        UserError: medsam2.json is missing or damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(
            f"{folder} has no {RECORD}, so nothing says which weights its adapter belongs to; medsam2 loads adapters "
            "that `medsam2 export --to adapter` wrote. Load it with peft and save the merged model as {'model': state}."
        )
    try:
        return AdapterRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged: {str(error).splitlines()[-1].strip()}; export the adapter again."
        ) from None


def find_base(folder: Path, record: AdapterRecord) -> str:
    """Where the adapter's base is: "nano", or a file of its name in the folder, beside it or where one works.

    Raises:
        UserError: it is nowhere there.
    """
    if record.base.file == NANO_ASSET.name:
        return "nano"
    for place in (folder, folder.resolve().parent, Path()):
        if (place / record.base.file).exists():
            return str(place / record.base.file)
    raise UserError(
        f"the adapter {folder} belongs to {record.base.file}, which is neither in it nor beside it nor in the working "
        f"folder; put the file (or a link to it) beside {folder.name}/."
    )


def load_adapter(folder: Path, sam: nn.Module, spec: ModelSpec) -> AdapterRecord:
    """Adapt `sam`, the adapter's base, and fill it from `folder`; what was trained is trainable again.

    Raises:
        UserError: `sam` is another network or has other weights than the adapter's base, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = read_record(folder)
    ours, theirs = (spec.name, spec.version), (record.spec.get("name"), record.spec.get("version"))
    if ours != theirs:
        raise UserError(f"{folder} is an adapter for {' '.join(map(str, theirs))}, not for {' '.join(ours)}.")
    digest = tensor_digest(base_state(sam))
    if digest != record.base.sha256:
        raise UserError(
            f"{folder} is an adapter for {record.base.file} (its tensors have sha256 {record.base.sha256[:12]}...), "
            f"but these weights have {digest[:12]}...; on another base its masks would be wrong. Give the one that it "
            "was trained on."
        )
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from None
    apply_adaptation(sam, record.adaptation)
    load_adapter_state(sam, {name.removeprefix(PEFT_PREFIX): value for name, value in state.items()}, str(folder))
    return record


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
