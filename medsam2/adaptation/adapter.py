"""An adapter on disk: peft's two files, and a third that names the weights it belongs to.

    adapter_config.json           peft's configuration
    adapter_model.safetensors     the adapter's weights, and those of SAM 2 that were trained in full (megabytes)
    medsam2.json                  `Provenance`: the base by the digest of its tensors, what was trained on what

An adapter on other weights than its own gives masks that are wrong without looking wrong; `load_adapter` refuses that.
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
PEFT_PREFIX = "base_model.model."  # where a `peft.PeftModel` keeps the network that it wraps


def tensor_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and float32 values: equal for equal weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().float().contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- in a run's checkpoints


def adapter_provenance(sam: nn.Module, settings: AdaptationSettings, source: str) -> AdapterProvenance | None:
    """What a checkpoint must say so that it can be merged or stripped later; None where nothing is adapted.

    Call it before the first optimiser step: the digest is of the weights that the run starts from.

    Args:
        source: where these came from; only the file's name is kept.
    """
    if settings.peft is None:
        return None
    base = BaseRecord(file=Path(source).absolute().name, sha256=tensor_digest(base_state(sam)))
    return AdapterProvenance(base=base, adaptation=settings)


def restore_adapted(sam: nn.Module, state: Mapping[str, Tensor], provenance: Provenance, source: str) -> None:
    """Adapt `sam`, a plain network, as the checkpoint's run did, and load `state`; what was trained is trainable.

    Raises:
        UserError: the checkpoint does not say how it was adapted, or its keys do not fit.
    """
    if provenance.adapter is None:
        raise UserError(f"{source} has an adapter but does not say which; give the folder of its run, or an export.")
    apply_adaptation(sam, provenance.adapter.adaptation)
    load_strictly(sam, state, source)


def load_merged(sam: nn.Module, state: Mapping[str, Tensor], provenance: Provenance, source: str) -> bool:
    """Fill the plain network `sam` from a checkpoint with an adapter and merge it; False: `state` has none."""
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
    """Whether `path` is a folder with an adapter (of ours or of peft's) in it."""
    return (path / CONFIG).is_file()


def read_record(folder: Path) -> Provenance:
    """What the adapter in `folder` says about itself.

    Raises:
        UserError: medsam2.json is missing or damaged, or names no base or no network.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(
            f"{folder} has no {RECORD}, so nothing says which weights its adapter belongs to; medsam2 loads adapters "
            "that `medsam2 export --to adapter` wrote. Load it with peft and save the merged model as {'model': state}."
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
    """Where the adapter's base is: "nano", or a file of its name in the folder, beside it or where one works.

    Raises:
        UserError: it is nowhere there.
    """
    assert provenance.adapter is not None, "`read_record` refuses a record without one"
    name = provenance.adapter.base.file
    if name == NANO_ASSET.name:
        return "nano"
    for place in (folder, folder.resolve().parent, Path()):
        if (place / name).exists() and (place / name).resolve() != folder.resolve():
            return str(place / name)
    raise UserError(
        f"the adapter {folder} belongs to {name}, which is neither in it nor beside it nor in the working folder; put "
        f"the file (or a link to it) beside {folder.name}/."
    )


def load_adapter(folder: Path, sam: nn.Module, spec: ModelSpec) -> None:
    """Adapt `sam`, the adapter's base, and fill it from `folder`; what was trained is trainable again.

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
            f"but these weights have {digest[:12]}...; on another base its masks would be wrong. Give its own base."
        )
    state = read_checkpoint(folder / WEIGHTS).state
    apply_adaptation(sam, adapter.adaptation)
    load_adapter_state(sam, {name.removeprefix(PEFT_PREFIX): value for name, value in state.items()}, str(folder))
