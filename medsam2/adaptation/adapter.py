"""Save and load adapters: peft's two files, and a third that identifies the base weights.

    adapter_config.json           peft's configuration
    adapter_model.safetensors     the adapter's weights, and those of SAM 2 that were trained in full (megabytes)
    medsam2.json                  `Provenance`: digest of the base's tensors, training data and settings

On other base weights an adapter gives wrong masks that look plausible, so `load_adapter` refuses other weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from medsam2.adaptation.freeze import AdaptationSettings, apply_adaptation
from medsam2.adaptation.lora import (
    adapter_state,
    base_state,
    has_adapter,
    is_adapted,
    load_adapter_state,
    merge,
    peft_config,
)
from medsam2.errors import UserError
from medsam2.files import atomic_write
from medsam2.model.checkpoint import load_strictly, read_checkpoint
from medsam2.model.provenance import AdapterProvenance, BaseRecord, Provenance, read_provenance
from medsam2.model.sizes import NANO_ASSET, ModelSpec

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "medsam2.json"
PEFT_PREFIX = "base_model.model."  # prefix of the wrapped network's parameters in a `peft.PeftModel`


def tensor_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and float32 values; equal weights in different files give equal digests."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().float().contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- in a run's checkpoints


def adapter_provenance(sam: nn.Module, settings: AdaptationSettings, source: str) -> AdapterProvenance | None:
    """Return the metadata that a checkpoint needs to be merged or stripped later; None without an adapter.

    Call it before the first optimiser step, since the digest identifies the weights from which the run starts.

    Args:
        source: path of these weights; only the file's name is stored.
    """
    if settings.peft is None:
        return None
    base = BaseRecord(file=Path(source).absolute().name, sha256=tensor_digest(base_state(sam)))
    return AdapterProvenance(base=base, adaptation=settings)


def restore_adapted(sam: nn.Module, state: Mapping[str, Tensor], provenance: Provenance, source: str) -> None:
    """Adapt the plain network `sam` as the checkpoint's run did, and load `state`; set `requires_grad` as in the run.

    Raises:
        UserError: the checkpoint has no settings of its adapter, or its keys do not fit.
    """
    if provenance.adapter is None:
        raise UserError(f"{source} has an adapter without settings; give the run folder or an export of the run.")
    apply_adaptation(sam, provenance.adapter.adaptation)
    load_strictly(sam, state, source)


def load_merged(sam: nn.Module, state: Mapping[str, Tensor], provenance: Provenance, source: str) -> bool:
    """Load a checkpoint with an adapter into the plain network `sam` and merge it; False if there is no adapter."""
    if not is_adapted(state):
        return False
    restore_adapted(sam, state, provenance, source)
    merge(sam)
    sam.requires_grad_(True)
    return True


# ------------------------------------------------------------------------------------------- in its own folder


def save_adapter(folder: Path, sam: nn.Module, provenance: Provenance) -> None:
    """Write the adapter of `sam` into an existing folder.

    Raises:
        UserError: `sam` has no adapter.
    """
    from safetensors.torch import save

    if not has_adapter(sam) or provenance.adapter is None or provenance.adapter.adaptation.peft is None:
        raise UserError("the model has no adapter to save.")
    tensors = {PEFT_PREFIX + name: value for name, value in adapter_state(sam).items()}
    config = peft_config(provenance.adapter.adaptation.peft, inference=True).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    files = {
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        CONFIG: json.dumps(plain, indent=2, sort_keys=True, default=str).encode() + b"\n",
        RECORD: json.dumps(provenance.to_dict(), indent=2).encode() + b"\n",
    }
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)


def is_adapter_folder(path: Path) -> bool:
    """Return whether `path` is a folder with an adapter, written by medsam2 or by peft."""
    return (path / CONFIG).is_file()


def read_record(folder: Path) -> Provenance:
    """Read the metadata of the adapter in `folder`.

    Raises:
        UserError: medsam2.json is missing or damaged, or lacks the base, the settings or the network.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(
            f"{folder} has no {RECORD}, which identifies the adapter's base weights; medsam2 loads only adapters that "
            "`medsam2 export --to adapter` wrote. Load it with peft and save the merged model as {'model': state}."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); export the adapter again.") from None
    provenance = read_provenance(values, path)
    if provenance.adapter is None or provenance.spec is None:
        raise UserError(f"{path} lacks the adapter's base, settings or network; export the adapter again.")
    return provenance


def find_base(folder: Path, provenance: Provenance) -> str:
    """Return the adapter's base: "nano", or a file of its name in the folder, beside it or in the working folder.

    Raises:
        UserError: there is no such file.
    """
    assert provenance.adapter is not None, "`read_record` refuses a record without one"
    name = provenance.adapter.base.file
    if name == NANO_ASSET.name:
        return "nano"
    for place in (folder, folder.resolve().parent, Path()):
        if (place / name).exists() and (place / name).resolve() != folder.resolve():
            return str(place / name)
    raise UserError(
        f"the adapter {folder} needs the base {name}, which is neither in this folder nor beside it nor in the working "
        f"folder; put the file (or a link to it) beside {folder.name}/."
    )


def load_adapter(folder: Path, sam: nn.Module, spec: ModelSpec) -> None:
    """Adapt the base `sam` and load the adapter in `folder`; set `requires_grad` as in training.

    Raises:
        UserError: `sam` is another network or has other weights than the adapter's base, or a file is damaged.
    """
    provenance = read_record(folder)
    adapter, adapted_spec = provenance.adapter, provenance.spec
    assert adapter is not None and adapted_spec is not None, "`read_record` refuses a record without one"
    if (spec.name, spec.version) != (adapted_spec.name, adapted_spec.version):
        raise UserError(
            f"{folder} is an adapter for {adapted_spec.name} {adapted_spec.version}, not for {spec.name} "
            f"{spec.version}."
        )
    digest = tensor_digest(base_state(sam))
    if digest != adapter.base.sha256:
        raise UserError(
            f"{folder} is an adapter for {adapter.base.file} (its tensors have sha256 {adapter.base.sha256[:12]}...), "
            f"but these weights have {digest[:12]}...; on other weights its masks would be wrong. Use that base."
        )
    state = read_checkpoint(folder / WEIGHTS).state
    apply_adaptation(sam, adapter.adaptation)
    load_adapter_state(sam, {name.removeprefix(PEFT_PREFIX): value for name, value in state.items()}, str(folder))
