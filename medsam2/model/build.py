"""Build a SAM 2 of any size and load a checkpoint into it.

Models are plain `sam2.modeling.sam2_base.SAM2Base` built from the yaml of the `sam2` package, so that their state
dicts are official state dicts. Importing `sam2` initialises Hydra globally; `import_sam2` restores Hydra's state, so
that `@hydra.main` and `hydra.compose` work before and after.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medsam2.adaptation.adapter import find_base, is_adapter_folder, load_adapter, load_merged, read_record
from medsam2.adaptation.lora import merge
from medsam2.config import preserve_hydra_state
from medsam2.errors import UserError, did_you_mean
from medsam2.files import atomic_write
from medsam2.model.checkpoint import (
    TRANSFORMERS,
    find_checkpoint,
    load_strictly,
    read_checkpoint,
    recognise,
    strip_wrappers,
)
from medsam2.model.provenance import Provenance
from medsam2.model.sizes import NANO, ModelSpec

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

BASE = "sam2.modeling.sam2_base.SAM2Base"
VIDEO_PREDICTOR = "sam2.sam2_video_predictor.SAM2VideoPredictor"


@dataclass(frozen=True)
class LoadedModel:
    """A network with weights (float32, on the CPU, in eval mode), and the metadata of its file."""

    sam: SAM2Base
    spec: ModelSpec
    provenance: Provenance = field(default_factory=Provenance)
    source: str = ""


# ---------------------------------------------------------------------------------------------------- building


def import_sam2(module: str = "sam2") -> Any:
    """Import `module` of the `sam2` package without its side effect on Hydra; use it for every import of sam2."""
    with preserve_hydra_state():
        return importlib.import_module(module)


def model_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the network's configuration as plain Python: the package's yaml, changed as `spec` requires.

    At sides other than 1024 px three entries change: `image_size` and the `feat_sizes` of both rotary encodings. Names
    and shapes of the weights stay the same.
    """
    from omegaconf import OmegaConf

    prefix, letter = f"sam{'2.1' if spec.version == '2.1' else '2'}", spec.size.yaml or "t"
    package = importlib.util.find_spec("sam2")  # locates the package without importing it
    assert package is not None and package.origin is not None, "rf-sam-2 is a dependency"
    path = Path(package.origin).parent / "configs" / prefix / f"{prefix}_hiera_{letter}.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing; the installed 'sam2' is not Meta's code: `pip install rf-sam-2`.")
    loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert isinstance(loaded, dict)
    config: dict[str, Any] = loaded["model"]
    if spec.name == NANO:
        _narrow(config)
    config["image_size"] = spec.image_size
    layer = config["memory_attention"]["layer"]
    layer["self_attention"]["feat_sizes"] = [spec.embedding_side] * 2
    layer["cross_attention"]["feat_sizes"] = [spec.embedding_side] * 2
    return config


def _narrow(config: dict[str, Any], width: int = 128, memory_width: int = 64) -> None:
    """Change the configuration of tiny into that of nano, in place (4.2 M parameters).

    With widths below 128, the mask decoder's eight heads are too narrow to learn the prompts.
    """
    trunk, neck = config["image_encoder"]["trunk"], config["image_encoder"]["neck"]
    trunk.update(
        embed_dim=32,
        num_heads=1,
        stages=[1, 2, 3, 1],
        global_att_blocks=[5],  # the last block of the stride-16 stage
        window_pos_embed_bkg_spatial_size=[8, 8],
        window_spec=[8, 4, 8, 4],
    )
    neck.update(d_model=width, backbone_channel_list=[256, 128, 64, 32])
    neck["position_encoding"]["num_pos_feats"] = width

    attention = config["memory_attention"]
    attention.update(d_model=width, num_layers=2)
    attention["layer"].update(d_model=width, dim_feedforward=512, dropout=0.0)
    attention["layer"]["self_attention"].update(embedding_dim=width, dropout=0.0)
    attention["layer"]["cross_attention"].update(embedding_dim=width, dropout=0.0, kv_in_dim=memory_width)

    encoder = config["memory_encoder"]
    encoder.update(in_dim=width, out_dim=memory_width)  # the package's default in_dim is 256
    encoder["position_encoding"]["num_pos_feats"] = memory_width
    encoder["mask_downsampler"]["embed_dim"] = width  # the default is 256 here, too
    encoder["fuser"]["layer"]["dim"] = width


def build_sam(spec: ModelSpec, *, target: str = BASE, overrides: Mapping[str, Any] | None = None) -> SAM2Base:
    """Build a network with random weights, float32, on the CPU.

    Args:
        target: another class with the same constructor, e.g. `VIDEO_PREDICTOR`.
        overrides: top-level entries of the configuration to replace, e.g. `{"fill_hole_area": 0}`.
    """
    import_sam2()
    from hydra.utils import instantiate

    config = {**model_config(spec), **(overrides or {}), "_target_": target}
    with preserve_hydra_state():
        sam: SAM2Base = instantiate(config, _convert_="all")
    return sam


# ---------------------------------------------------------------------------------------------------- loading


def load_model(path_or_name: str | Path, spec: ModelSpec | None = None, averaged: bool | None = None) -> LoadedModel:
    """Build a network and load the weights of `path_or_name` strictly; adapters are merged.

    Args:
        path_or_name: "nano" (shipped in the package), an official or exported `.pt`, a `.safetensors` of medsam2, a
            Lightning `.ckpt`, a run folder (its best, else its last checkpoint), an export folder or an adapter folder.
        spec: the network to build; None to use the file's metadata or, without metadata, the names and shapes of its
            tensors (official files then get 1024 px). Name and version must match the file; `image_size` is free.
        averaged: see `read_checkpoint`.

    Raises:
        UserError: the file does not exist (the message says where Meta publishes it), holds no SAM 2, has tensors that
            do not fit, or is damaged or not finite.
    """
    if is_adapter_folder(Path(path_or_name).expanduser()):
        if averaged is not None:
            raise UserError(f"--weights: {path_or_name} is an adapter with one set of weights; leave the option out.")
        return _load_onto_base(Path(path_or_name).expanduser(), spec)
    path = find_checkpoint(str(path_or_name))
    checkpoint = read_checkpoint(path, averaged)
    recognised, naming = recognise(checkpoint.state, path)
    if naming == TRANSFORMERS:
        raise UserError(
            f"{path} holds a SAM 2 under transformers' names; bring it into our format first: "
            f"medsam2 import {path.parent} --out FOLDER"
        )
    spec = spec or checkpoint.provenance.spec or recognised
    if (spec.name, spec.version) != (recognised.name, recognised.version):
        raise UserError(
            f"{path} holds {recognised.name} {recognised.version}, but {spec.name} {spec.version} was asked for; "
            f"set the model to {recognised.name}, version {recognised.version}, or give another checkpoint."
        )
    sam = build_sam(spec)
    if not load_merged(sam, checkpoint.state, checkpoint.provenance, str(path)):
        load_strictly(sam, checkpoint.state, path)
    return LoadedModel(sam.eval(), spec, checkpoint.provenance, str(path))


def _load_onto_base(folder: Path, spec: ModelSpec | None) -> LoadedModel:
    """Load the base of the adapter in `folder` and merge the adapter into it."""
    provenance = read_record(folder)
    base = load_model(find_base(folder, provenance), spec or provenance.spec)
    load_adapter(folder, base.sam, base.spec)
    merge(base.sam)
    base.sam.requires_grad_(True)
    return LoadedModel(base.sam, base.spec, provenance.model_copy(update={"adapter": None}), str(folder))


def save_asset(
    path: Path | str, state_dict: Mapping[str, Tensor], spec: ModelSpec, metadata: Mapping[str, Any]
) -> None:
    """Write half-precision weights as the shipped nano, with `spec` and `metadata` (of a `Provenance`) as header."""
    from safetensors.torch import save

    tensors = {
        key: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous().clone()
        for key, value in strip_wrappers(state_dict)[0].items()
    }
    provenance = Provenance.model_validate({**metadata, "spec": spec})
    header = {"medsam2": json.dumps(provenance.to_dict(), sort_keys=True)}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata=header))


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device for the setting `device=NAME`.

    Args:
        local_rank: rank of this process on this machine, for `auto` and `cuda` to assign one of its GPUs.

    Raises:
        UserError: there is no such device.
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
    if device.type == "cuda" and device.index is None and local_rank is not None:
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return device
