"""What lies at a path of others: the file of the weights, and what the configuration beside it says of the network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from medsam2.errors import UserError
from medsam2.model.build import ModelSpec, model_config
from medsam2.model.checkpoint import Checkpoint, read_checkpoint, shortened

TORCH_ENDINGS = (".pt", ".pth", ".ckpt", ".bin")
NAMES_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")  # of transformers, in the order of preference
# Keys of a model's yaml that change neither the weights nor the masks.
KEYS_WITHOUT_EFFECT = {"image_size", "feat_sizes", "_target_", "dropout", "compile_image_encoder", "drop_path_rate",
                       "layer_scale_init_value"}  # fmt: skip


def find_weights(source: Path) -> Path:
    """The file with the tensors at a path.

    Raises:
        UserError: nothing there, several candidates, a run of ours, or an adapter.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; give a file (.pt, .safetensors) or a folder of transformers.")
    weights = _in_folder(source) if source.is_dir() else source
    if weights.suffix not in (*TORCH_ENDINGS, ".safetensors"):
        raise UserError(
            f"{weights} is of no known kind; give a {', '.join(TORCH_ENDINGS)} or .safetensors file, or a folder."
        )
    return weights


def _in_folder(folder: Path) -> Path:
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} is a run of medsam2: nothing to import. `medsam2 export -c {folder}` writes it out.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is an adapter: it needs its base. `medsam2 export -c {folder}` merges the two.")
    for name in NAMES_IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    candidates = sorted(path for path in folder.iterdir() if path.suffix in (*TORCH_ENDINGS, ".safetensors"))
    if not candidates:
        raise UserError(
            f"{folder} holds no weights: no {', '.join(NAMES_IN_FOLDER)}, and no {', '.join(TORCH_ENDINGS)} file."
        )
    if any(folder.glob("*.index.json")):
        raise UserError(f"{folder} holds weights split over several files; save them as one safetensors file.")
    if len(candidates) > 1:
        names = shortened([path.name for path in candidates])
        raise UserError(f"{folder} holds {len(candidates)} files of weights ({names}); give the one that is meant.")
    return candidates[0]


def find_config(weights: Path) -> Path | None:
    """config.json beside the weights of transformers, or a yaml of the same stem."""
    beside = [weights.with_suffix(".yaml")]
    if weights.suffix in (".safetensors", ".bin"):
        beside.insert(0, weights.parent / "config.json")
    return next((path for path in beside if path.is_file()), None)


def read_weights(path: Path) -> tuple[Checkpoint, list[str]]:
    """The weights, and notes for the user about what was taken off or changed.

    Raises:
        UserError: see `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    notes = []
    if checkpoint.bare:
        notes.append("a bare state dict: Meta's code expects it under the key 'model', where it now is")
    if checkpoint.wrappers:
        notes.append(f"taken off every name: {' and '.join(checkpoint.wrappers)}")
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in checkpoint.state.values()} - {"float32"})
    if dtypes:
        notes.append(f"stored as {', '.join(dtypes)}, written as float32")
    return checkpoint, notes


class NetworkConfig(NamedTuple):
    """What a configuration says of a network: side of its input in px (0: nothing), version ("" likewise), notes."""

    image_size: int = 0
    version: str = ""
    notes: tuple[str, ...] = ()


def read_config(path: Path, spec: ModelSpec) -> NetworkConfig:
    """What a configuration says of a network that its tensors say is `spec`.

    Raises:
        UserError: it is no configuration, its sizes contradict each other, or it is of another version.
    """
    config = _of_transformers(path) if path.suffix == ".json" else _of_yaml(path, spec)
    if config.version not in ("", spec.version):
        raise UserError(
            f"the file holds SAM {spec.version} weights ({'with' if spec.version == '2.1' else 'without'} "
            f"no_obj_embed_spatial and obj_ptr_tpos_proj), but {path} describes SAM {config.version}: they do not "
            f"belong together. Give the configuration of {spec.version} with --config, or move {path.name} away."
        )
    return config


def _of_yaml(path: Path, spec: ModelSpec) -> NetworkConfig:
    """A yaml in the way of Meta's: the network under `model`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no yaml ({str(error).splitlines()[0]}); give another with --config.") from None
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or "image_encoder" not in model:
        raise UserError(f"{path} describes no SAM 2 (no model.image_encoder in it); give the right one with --config.")
    side, version = model.get("image_size"), "2.1" if model.get("no_obj_embed_spatial") else "2.0"
    notes = [] if isinstance(side, int) else [f"{path.name} does not state image_size as a number"]
    changes = list(_changes(model_config(spec), model)) if version == spec.version else []
    if changes:
        notes.append(
            f"{path.name} is unlike Meta's {spec.name} ({shortened(changes)}); medsam2 builds Meta's, so masks may "
            "differ from those of the tool that it came from"
        )
    return NetworkConfig(side if isinstance(side, int) else 0, version, tuple(notes))


def _changes(metas: Mapping[str, Any], other: Mapping[str, Any], stem: str = "") -> Iterator[str]:
    """Entries that enter the masks and have other values, as "a.b=1 (2 here)"."""
    for key in sorted(metas.keys() & other.keys() - KEYS_WITHOUT_EFFECT):
        if isinstance(metas[key], Mapping) and isinstance(other[key], Mapping):
            yield from _changes(metas[key], other[key], f"{stem}{key}.")
        elif not isinstance(other[key], str) and other[key] != metas[key]:
            yield f"{stem}{key}={other[key]} ({metas[key]} here)"


def _of_transformers(path: Path) -> NetworkConfig:
    """config.json: every entry that the side enters must agree, since transformers says nothing when they do not.

    Raises:
        UserError: it is not of SAM 2, or two entries name different sides.
    """
    from transformers import Sam2VideoConfig

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = str(content.get("model_type"))
        config: Any = Sam2VideoConfig.from_dict(content) if kind == "sam2_video" else None
    except Exception as error:  # transformers raises a dozen kinds for entries of a wrong type
        raise UserError(f"{path} is no configuration of transformers ({error}); download it again.") from None
    if not kind.startswith("sam2"):
        raise UserError(f"{path} is of the model {kind!r}, not of sam2 or sam2_video.")
    if config is None:
        return NetworkConfig()  # of pictures alone: the message about its weights says more
    vision: Any = config.vision_config
    entries = {
        "image_size": (1, config.image_size),
        "prompt_encoder_config.image_size": (1, config.prompt_encoder_config.image_size),
        "vision_config.backbone_config.image_size": (1, vision.backbone_config.image_size),
        "vision_config.backbone_feature_sizes": (4, vision.backbone_feature_sizes),
        "memory_attention_rope_feat_sizes": (16, config.memory_attention_rope_feat_sizes),
    }
    sides = {name: stride * int(np.ravel(value)[0]) for name, (stride, value) in entries.items()}
    if len({*sides.values()}) > 1:
        named = ", ".join(f"{name} {side} px" for name, side in sides.items())
        raise UserError(
            f"{path} contradicts itself about the side of the input: {named}. transformers loads it without a word and "
            "gives other masks; mend the file, or take config.json away and give --image-size."
        )
    return NetworkConfig(sides["image_size"], "2.1" if config.enable_occlusion_spatial_embedding else "2.0")
