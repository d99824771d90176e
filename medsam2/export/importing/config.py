"""What the configuration beside foreign weights says: the side of the input, the version, and what is unlike Meta's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsam2.errors import UserError
from medsam2.export.importing.files import Files
from medsam2.model.build import ModelSpec, model_config

NAMED_ENTRIES = 4
SIDES = {"image_size", "feat_sizes"}  # free, and the same weights
NOT_OF_THE_MASKS = SIDES | {"_target_", "dropout", "compile_image_encoder", "drop_path_rate", "layer_scale_init_value"}


@dataclass(frozen=True)
class NetworkConfig:
    """source: the file, for messages. image_size: px, 0 where it does not say. version: "" likewise."""

    source: Path | None = None
    image_size: int = 0
    version: str = ""
    notes: tuple[str, ...] = ()


def read_config(files: Files, kind: str, spec: ModelSpec) -> NetworkConfig:
    """What the file beside the weights says of a network that its keys say is `spec`.

    Raises:
        UserError: it is no configuration, or its sizes contradict each other.
    """
    if files.config is None:
        return NetworkConfig()
    if files.config.suffix == ".json":
        return _of_transformers(files.config) if kind == "huggingface" else NetworkConfig()
    return _of_yaml(files.config, spec)


def _of_yaml(path: Path, spec: ModelSpec) -> NetworkConfig:
    """A yaml in the way of Meta's: the network under `model`."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no yaml ({str(error).splitlines()[0]}); give another with --config.") from None
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or "image_encoder" not in model:
        raise UserError(f"{path} describes no SAM 2 (no model.image_encoder in it); give the right one with --config.")
    side = model.get("image_size")
    version = "2.1" if model.get("no_obj_embed_spatial") else "2.0"
    notes = [] if isinstance(side, int) else [f"{path.name} does not state image_size as a number"]
    if version == spec.version:
        unlike = list(_unlike(model_config(spec), model))
        if unlike:
            more = f" and {len(unlike) - NAMED_ENTRIES} more" if len(unlike) > NAMED_ENTRIES else ""
            notes.append(
                f"{path.name} is unlike Meta's {spec.name} ({', '.join(unlike[:NAMED_ENTRIES])}{more}); medsam2 builds "
                "Meta's, so masks may differ from those of the tool that it came from"
            )
    return NetworkConfig(path, side if isinstance(side, int) else 0, version, tuple(notes))


def _unlike(own: Mapping[str, Any], other: Mapping[str, Any], stem: str = "") -> Iterator[str]:
    """Entries that enter the masks and have other values, as "a.b=1 (2 here)"."""
    for key, value in own.items():
        if key in NOT_OF_THE_MASKS or key not in other:
            continue
        if isinstance(value, Mapping) and isinstance(other[key], Mapping):
            yield from _unlike(value, other[key], f"{stem}{key}.")
        elif not isinstance(other[key], str) and other[key] != value:
            yield f"{stem}{key}={other[key]} ({value} here)"


def _of_transformers(path: Path) -> NetworkConfig:
    """config.json: every entry that the side enters must agree, since transformers says nothing when they do not.

    Raises:
        UserError: it is not of SAM 2, or two entries name different sides.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = str(content.get("model_type"))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is no configuration of transformers ({error}); download it again.") from None
    if not kind.startswith("sam2"):
        raise UserError(f"{path} is of the model {kind!r}, not of sam2 or sam2_video.")
    sides = {name: side for name, side in _sides(content).items() if side}
    if len({*sides.values()}) > 1:
        named = ", ".join(f"{name} {side} px" for name, side in sides.items())
        raise UserError(
            f"{path} contradicts itself about the side of the input: {named}. transformers loads it without a word and "
            "gives other masks; mend the file, or take config.json away and give --image-size."
        )
    version = "2.1" if content.get("enable_occlusion_spatial_embedding", True) else "2.0"
    return NetworkConfig(path, next(iter(sides.values()), 0), version if kind == "sam2_video" else "")


def _sides(content: Mapping[str, Any]) -> dict[str, int]:
    """The side in px that each entry stands for; 1024 where transformers would take its default."""
    vision = content.get("vision_config") or {}
    backbone = vision.get("backbone_config") or {}
    finest = (vision.get("backbone_feature_sizes") or [[256, 256]])[0]
    rope = content.get("memory_attention_rope_feat_sizes") or [64, 64]
    return {
        "image_size": _side(content.get("image_size", 1024)) if content.get("model_type") == "sam2_video" else 0,
        "prompt_encoder_config.image_size": _side((content.get("prompt_encoder_config") or {}).get("image_size", 1024)),
        "vision_config.backbone_config.image_size": _side(backbone.get("image_size", 1024)),
        "vision_config.backbone_feature_sizes": 4 * _side(finest),
        "memory_attention_rope_feat_sizes": 16 * _side(rope) if content.get("model_type") == "sam2_video" else 0,
    }


def _side(value: Any) -> int:
    first = value[0] if isinstance(value, list | tuple) and value else value
    return int(first) if isinstance(first, int | float) else 0
