"""Build a SAM 2 of any size and fill it from a checkpoint; the only file of `model/` that reads files.

Models are plain `sam2.modeling.sam2_base.SAM2Base` built from the package's own yaml, so that a state dict here is an
official state dict. Importing `sam2` initialises Hydra globally; `import_sam2` undoes that, so that `@hydra.main` and
`hydra.compose` work before and after.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medsam2.config import untouched_hydra
from medsam2.errors import UserError, did_you_mean
from medsam2.files import atomic_write
from medsam2.model.adapter import find_base, is_adapter_folder, load_adapter, load_merged, read_record
from medsam2.model.lora import merge
from medsam2.model.sizes import NANO, NANO_ASSET, SIZES, ModelRow, ModelSpec, model_table

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

__all__ = ["LoadedModel", "ModelRow", "ModelSpec", "build_sam", "import_sam2", "load_model", "model_config",
           "model_table", "save_asset"]  # fmt: skip

BASE = "sam2.modeling.sam2_base.SAM2Base"
VIDEO_PREDICTOR = "sam2.sam2_video_predictor.SAM2VideoPredictor"
LIGHTNING_PREFIX = "tracker.sam."  # where a FineTuner keeps the network
FIRST_WEIGHT = "image_encoder.trunk.patch_embed.proj.weight"
TRANSFORMERS_WEIGHT = "vision_encoder.backbone.patch_embed.projection.weight"


@dataclass(frozen=True)
class LoadedModel:
    """A network with weights (float32, on the CPU, in eval mode), and what its file said about itself."""

    sam: SAM2Base
    spec: ModelSpec
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""


# ---------------------------------------------------------------------------------------------------- building


def import_sam2(module: str = "sam2") -> Any:
    """Import `module` of the `sam2` package without its side effect on Hydra. All of medsam2 imports sam2 through it.

    Raises:
        UserError: the package is not installed.
    """
    _package_folder()
    with untouched_hydra():
        return importlib.import_module(module)


def _package_folder() -> Path:
    """Folder of the installed `sam2` package, found without importing it."""
    found = importlib.util.find_spec("sam2")
    if found is None or not found.submodule_search_locations:
        raise UserError("the package 'sam2' is not installed; `pip install rf-sam-2` provides it.")
    return Path(found.submodule_search_locations[0])


def model_config(spec: ModelSpec) -> dict[str, Any]:
    """The network's configuration as plain Python: the package's own yaml with what `spec` changes.

    Off 1024 px three entries change: `image_size` and the `feat_sizes` of both rotary encodings; keys and shapes of
    the weights stay the same.
    """
    from omegaconf import OmegaConf

    prefix, letter = f"sam{'2.1' if spec.version == '2.1' else '2'}", spec.size.yaml or "t"
    path = _package_folder() / "configs" / prefix / f"{prefix}_hiera_{letter}.yaml"
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
    """Turn the configuration of tiny into that of nano, in place (4.2 M parameters).

    Widths below 128 leave the mask decoder's eight heads too narrow to learn the prompts.
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
    encoder.update(in_dim=width, out_dim=memory_width)  # the package's default of in_dim is 256
    encoder["position_encoding"]["num_pos_feats"] = memory_width
    encoder["mask_downsampler"]["embed_dim"] = width  # likewise
    encoder["fuser"]["layer"]["dim"] = width


def build_sam(spec: ModelSpec, *, target: str = BASE, overrides: Mapping[str, Any] | None = None) -> SAM2Base:
    """A network with random weights, float32, on the CPU.

    Args:
        target: another class of the same constructor, e.g. `VIDEO_PREDICTOR`.
        overrides: top-level entries of the configuration to replace, e.g. `{"fill_hole_area": 0}`.
    """
    import_sam2()
    from hydra.utils import instantiate

    config = {**model_config(spec), **(overrides or {}), "_target_": target}
    with untouched_hydra():
        sam: SAM2Base = instantiate(config, _convert_="all")
    return sam


# ---------------------------------------------------------------------------------------------------- loading


def load_model(path_or_name: str | Path, spec: ModelSpec | None = None) -> LoadedModel:
    """A network with the weights of `path_or_name`, loaded strictly.

    Args:
        path_or_name: "nano" (shipped in the package), an official or exported `.pt`, a `.safetensors` of ours, a
            Lightning `.ckpt`, a run folder (its best, else its last checkpoint) or an export folder.
        spec: what to build; where None, what the file says about itself, else what its keys and shapes say (official
            files then get their 1024 px). Name and version must agree with the file; `image_size` is free.

    Raises:
        UserError: no such file (naming where Meta publishes it), no SAM 2 in it, or keys that do not fit.
    """
    if is_adapter_folder(Path(path_or_name).expanduser()):
        return _load_onto_base(Path(path_or_name).expanduser(), spec)
    path = find_checkpoint(str(path_or_name))
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    else:
        raw, metadata = read_torch(path)
        state = clean_state(raw)
    found = _recognise(state, path)
    if spec is None:
        spec = ModelSpec.from_dict(metadata["spec"]) if "spec" in metadata else found
    if (spec.name, spec.version) != (found.name, found.version):
        raise UserError(
            f"{path} holds {found.name} {found.version}, but {spec.name} {spec.version} was asked for; "
            f"set the model to {found.name}, version {found.version}, or give another checkpoint."
        )
    sam = build_sam(spec)
    if not load_merged(sam, state, metadata, str(path)):
        load_strictly(sam, state, path)
    return LoadedModel(sam.eval(), spec, metadata, str(path))


def _load_onto_base(folder: Path, spec: ModelSpec | None) -> LoadedModel:
    """The base of an adapter with the adapter merged in."""
    record = read_record(folder)
    base = load_model(find_base(folder, record), spec or ModelSpec.from_dict(record.spec))
    load_adapter(folder, base.sam, base.spec)
    merge(base.sam)
    base.sam.requires_grad_(True)
    return LoadedModel(base.sam, base.spec, {**base.metadata, **record.metadata()}, str(folder))


def clean_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Official key names: without the prefixes of torch.compile, of averaged or distributed models, and of trainers.

    A training checkpoint (ours or another Lightning project's) keeps the network under a prefix, beside parts that are
    not SAM's (losses, metrics): where the image encoder's first weight has one, only keys with it are kept.
    """
    names = {key.replace("_orig_mod.", ""): value for key, value in state.items() if key != "n_averaged"}
    while names and all(key.startswith("module.") for key in names):
        names = {key.removeprefix("module."): value for key, value in names.items()}
    stem = next((key for key in names if key.endswith(FIRST_WEIGHT)), FIRST_WEIGHT)
    prefix = stem.removesuffix(FIRST_WEIGHT)
    own = {key.removeprefix(prefix): value for key, value in names.items() if key.startswith(prefix)}
    return {key: value for key, value in own.items() if isinstance(value, Tensor)}


def load_strictly(sam: torch.nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """`load_state_dict(strict=True)` in float32, with an error that names the keys.

    Raises:
        UserError: a missing or an extra key, or another shape.
    """
    own = sam.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    for what, keys in (("lacks", missing), ("has the extra", extra), ("has another shape for", shapes)):
        if keys:
            named = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(f"{source} does not fit the model: it {what} {named}.")
    sam.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()}, strict=True)


def _recognise(state: Mapping[str, Tensor], source: Path) -> ModelSpec:
    """Name and version by shapes and keys; 2.1 added `no_obj_embed_spatial` and `obj_ptr_tpos_proj`."""
    patch = state.get(FIRST_WEIGHT)
    if patch is None and TRANSFORMERS_WEIGHT in state:
        raise UserError(
            f"{source} holds a SAM 2 under transformers' names; bring it into our format first: "
            f"medsam2 import {source.parent} --out FOLDER"
        )
    if patch is None or patch.ndim != 4:
        raise UserError(
            f"{source} holds no SAM 2 weights (no image_encoder.trunk.patch_embed.proj.weight under the key 'model'); "
            "give an official .pt, a checkpoint of medsam2 or a run folder."
        )
    blocks = {key.split(".")[3] for key in state if key.startswith("image_encoder.trunk.blocks.")}
    for size in SIZES.values():
        if (size.embed_dim, size.blocks) == (patch.shape[0], len(blocks)):
            return ModelSpec(size.name, "2.1" if "no_obj_embed_spatial" in state else "2.0")
    raise UserError(
        f"{source} is a SAM 2 of a size that medsam2 does not know (first width {patch.shape[0]}, "
        f"{len(blocks)} blocks); known: {', '.join(SIZES)}."
    )


def find_checkpoint(path_or_name: str) -> Path:
    """The file to read for a path, a name or a folder."""
    path = Path(path_or_name).expanduser()
    if path_or_name in ("nano", NANO):
        if not NANO_ASSET.is_file():
            raise UserError(
                f"the shipped checkpoint {NANO_ASSET} is missing from this installation; reinstall medsam2, or train "
                "it with `make pretrain`."
            )
        return NANO_ASSET
    if path.is_dir():
        candidates = [path / "checkpoints" / f"{stem}.ckpt" for stem in ("best", "last", "previous")]
        candidates += sorted(path.glob("*.pt"))[:1] + sorted(path.glob("*.safetensors"))[:1]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        raise UserError(
            f"{path} holds no checkpoint: expected checkpoints/best.ckpt or checkpoints/last.ckpt (a training run), "
            "or a .pt file (an export)."
        )
    if path.is_file():
        return path
    raise UserError(_missing(path_or_name, path))


def _missing(given: str, path: Path) -> str:
    """Say where Meta publishes the file that was probably meant."""
    rows = [row for row in model_table() if row.url]
    for row in rows:
        short = row.name.removeprefix("hiera_")
        if path.name == row.file_name or given in (row.name, short, f"sam{row.version}_{row.name}"):
            return (
                f"checkpoint {given} was not found. Meta publishes {row.name} {row.version} as {row.file_name} at "
                f"{row.url} ; download it and give its path, FOLDER/{row.file_name}, or use the shipped 'nano'."
            )
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, [*beside, *(row.file_name for row in rows), "nano"])
    return (
        f"checkpoint {given} was not found.{hint} Give a file, a run folder or 'nano' (shipped); `medsam2 models` "
        "lists the official files and where Meta publishes them."
    )


def read_torch(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """State dict and our metadata of a `.pt` or `.ckpt`, without ever running code that a pickle carries."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, and is not unpickled, since a pickle can run code: "
            f"{_first_line(error)} Save it again as {{'model': state_dict}}."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a readable checkpoint (cut short, or of another kind): {_first_line(error)}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary with the key 'model'.")
    metadata = content.get("medsam2")
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            return content[key], dict(metadata or {})
    return content, dict(metadata or {})  # a bare state dict


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------- the asset


def save_asset(
    path: Path | str, state_dict: Mapping[str, Tensor], spec: ModelSpec, metadata: Mapping[str, Any]
) -> None:
    """Write weights in half precision with `spec` and `metadata` (JSON values) in the header, as shipped for nano."""
    from safetensors.torch import save

    state = clean_state(state_dict)
    tensors = {
        key: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous().clone()
        for key, value in state.items()
    }
    header = {"medsam2": json.dumps({**metadata, "spec": spec.to_dict()}, sort_keys=True)}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata=header))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {_first_line(error)}") from None
    return state, json.loads(header.get("medsam2", "{}"))
