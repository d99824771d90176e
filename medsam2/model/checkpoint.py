"""Find checkpoint files, check their integrity, and read their weights under Meta's names.

All weights are read here: no pickle that could run code is loaded, damaged files and values that are not finite are
refused, and the metadata of a file becomes a `Provenance`.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsam2.errors import UserError, did_you_mean, first_line
from medsam2.model.provenance import Provenance, read_provenance
from medsam2.model.sizes import NANO, NANO_ASSET, PUBLISHED, SIZES, ModelSpec

NAMES_IN_ERRORS = 3  # number of tensor names that a message lists before it counts the others
OTHER_NETWORKS = {
    "image_encoder.blocks.0.attn.qkv.weight": "a SAM 1, as MedSAM is",
    "vision_encoder.layers.0.attn.qkv.weight": "a SAM 1 of transformers (SamModel)",
}


@dataclass(frozen=True)
class Naming:
    """Names of the tensors by which a SAM 2 is recognised, in one family of files.

    Attributes:
        first_weight: first weight of the image encoder; its width identifies the size.
        blocks: prefix of the names of Hiera's blocks, followed by the block's number.
        only_in_2_1: a tensor that version 2.1 added.
    """

    first_weight: str
    blocks: str
    only_in_2_1: str


META = Naming("image_encoder.trunk.patch_embed.proj.weight", "image_encoder.trunk.blocks.", "no_obj_embed_spatial")
TRANSFORMERS = Naming(
    "vision_encoder.backbone.patch_embed.projection.weight",
    "vision_encoder.backbone.blocks.",
    "occlusion_spatial_embedding_parameter",
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
        state: tensors without the prefixes of wrappers, all finite.
        provenance: the file's metadata; empty for files that medsam2 did not write.
        wrappers: descriptions of the prefixes that were removed.
        bare: whether the tensors are at the top level of the file, not under "model" or "state_dict".
    """

    state: dict[str, Tensor]
    provenance: Provenance
    wrappers: tuple[str, ...] = ()
    bare: bool = False


def read_checkpoint(path: Path, averaged: bool | None = None) -> Checkpoint:
    """Read the weights in a `.pt`, `.ckpt` or `.safetensors` file.

    Args:
        averaged: for a run with a moving average: True for the averaged weights, False for those of the last step,
            None for the file's default.

    Raises:
        UserError: the file is damaged, cut short or of another kind, would have to be unpickled, holds values that are
            not finite, or has no average where one is asked for.
    """
    if path.suffix == ".safetensors":
        raw, header = _read_safetensors(path)
        content: dict[str, Any] = {"model": raw, "medsam2": header}
    else:
        content = _read_torch(path)
    if averaged is not None:
        # Lightning stores the weights of the last step beside the averaged ones.
        if "averaging_state" not in content or not isinstance(content.get("current_model_state"), dict):
            word = "ema" if averaged else "raw"
            raise UserError(
                f"--weights {word}: {path} has one set of weights, without a moving average; leave the option out. "
                "(A run keeps both with ema=0.999.)"
            )
        content = content if averaged else {**content, "model": content["current_model_state"]}
    named = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), None)
    state, wrappers = strip_wrappers(content if named is None else named)
    refuse_nonfinite(state, path)
    return Checkpoint(state, read_provenance(content.get("medsam2"), path), wrappers, named is None)


# ---------------------------------------------------------------------------------------------------- files


def find_checkpoint(path_or_name: str) -> Path:
    """Return the file to read for a path, a name or a folder.

    Raises:
        UserError: the file does not exist; the message says where Meta publishes the one that was probably meant.
    """
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
    raise UserError(_not_found_message(path_or_name, path))


def _not_found_message(name: str, path: Path) -> str:
    """Return an error message that says where Meta publishes the file that was probably meant."""
    for size, version in PUBLISHED:
        short, file = size.name.removeprefix("hiera_"), size.file_name(version)
        if path.name == file or name in (size.name, short, f"sam{version}_{size.name}"):
            return (
                f"checkpoint {name} was not found. Meta publishes {size.name} {version} as {file} at "
                f"{size.url(version)} ; download it and give its path, FOLDER/{file}, or use the shipped 'nano'."
            )
    neighbours = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, [*neighbours, *(size.file_name(version) for size, version in PUBLISHED), "nano"])
    return (
        f"checkpoint {name} was not found.{hint} Give a file, a run folder or 'nano' (shipped); `medsam2 models` "
        "lists the official files and where Meta publishes them."
    )


def _read_torch(path: Path) -> dict[str, Any]:
    """Load the dictionary in a `.pt` or `.ckpt` without running code from its pickle.

    torch does not verify the checksums of the archive, so that a flipped bit would silently change a weight; they are
    verified here first.
    """
    try:
        if zipfile.is_zipfile(path) and not is_intact(path):
            raise UserError(f"{path} is damaged: a checksum in it is wrong; get the file again.")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch and zipfile raise many types for files of other kinds
        if isinstance(error, pickle.UnpicklingError):  # torch's message advises to unpickle the file
            names = re.findall(r"GLOBAL (\S+)", str(error))
            raise UserError(
                f"{path} holds more than tensors and plain values{f' ({names[0]})' if names else ''}, and is not "
                "unpickled, since a pickle can run code. Save it again as {'model': state_dict}."
            ) from None
        raise UserError(
            f"{path} is not a readable checkpoint (cut short, or of another kind): {first_line(error)}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary with the key 'model'.")
    return content


def is_intact(path: Path) -> bool:
    """Return whether a file is a zip archive, as torch writes it, whose members all match their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises many types for a damaged directory
        return False


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        return state, json.loads(header["medsam2"]) if "medsam2" in header else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {first_line(error)}") from None


# ---------------------------------------------------------------------------------------------------- tensors


def strip_wrappers(raw: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Remove the name prefixes of torch.compile, of averaged or distributed models and of trainers.

    A training checkpoint (ours or another Lightning project's) stores the network under a prefix, beside tensors of
    other modules (losses, metrics). If the image encoder's first weight has a prefix, names without it are dropped.

    Returns:
        The tensors, and descriptions of the prefixes.
    """
    wrappers = ["'_orig_mod.' (torch.compile)"] if any("_orig_mod." in key for key in raw) else []
    names = {key.replace("_orig_mod.", ""): value for key, value in raw.items() if isinstance(value, Tensor)}
    for first_weight in (META.first_weight, TRANSFORMERS.first_weight):
        stem = next((key for key in names if key.endswith(first_weight)), None)
        if stem is not None:
            prefix = stem.removesuffix(first_weight)
            wrappers += [f"'{prefix}'" + " (a distributed or averaged model)" * (prefix == "module.")] if prefix else []
            names = {key.removeprefix(prefix): value for key, value in names.items() if key.startswith(prefix)}
            break
    names.pop("n_averaged", None)
    return names, tuple(wrappers)


def recognise(state: Mapping[str, Tensor], source: str | Path) -> tuple[ModelSpec, Naming]:
    """Recognise size, version and naming of a network by the width and number of Hiera's blocks and by what 2.1 added.

    The input side cannot be recognised, since weights have the same shapes at every side.

    Raises:
        UserError: the network is not a SAM 2, or has a size that Meta did not publish.
    """
    naming = next((naming for naming in (META, TRANSFORMERS) if naming.first_weight in state), None)
    if naming is None or state[naming.first_weight].ndim != 4:
        for key, network in OTHER_NETWORKS.items():
            if any(name.endswith(key) for name in state):
                raise UserError(f"{source} is {network}, not a SAM 2: medsam2 cannot use its weights.")
        raise UserError(
            f"{source} holds no SAM 2 weights: of its {len(state)} tensors none is {META.first_weight} (Meta's name) "
            f"or {TRANSFORMERS.first_weight} (transformers'); it begins with {shortened(state) or 'nothing'}. Give an "
            "official .pt, a checkpoint of medsam2 or a run folder."
        )
    width = state[naming.first_weight].shape[0]
    blocks = len({key.split(".")[3] for key in state if key.startswith(naming.blocks)})
    version = "2.1" if naming.only_in_2_1 in state else "2.0"
    for size in SIZES.values():
        if (size.embed_dim, size.blocks) == (width, blocks):
            if version not in size.parameters:
                raise UserError(
                    f"{source} is a {size.name} without {naming.only_in_2_1}; it exists as "
                    f"{', '.join(size.parameters)} only: is the file cut, or from another tool?"
                )
            return ModelSpec(size.name, version), naming
    raise UserError(
        f"{source} is a SAM 2 of a size that medsam2 does not know (first width {width}, {blocks} blocks); known: "
        f"{', '.join(f'{size.name} ({size.embed_dim}, {size.blocks})' for size in SIZES.values())}."
    )


def load_strictly(sam: torch.nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` with `load_state_dict(strict=True)` in the precision of the network.

    Raises:
        UserError: names or shapes do not fit; the message counts and names them all.
    """
    expected = sam.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [
        f"{key}: {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = []
    if missing:
        problems.append(f"it lacks {len(missing)} of {len(expected)} tensors ({shortened(missing)})")
    if extra:
        problems.append(f"it has {len(extra)} more ({shortened(extra)})")
    if shapes:
        problems.append(f"{len(shapes)} {'has' if len(shapes) == 1 else 'have'} another shape ({shortened(shapes)})")
    if problems:
        raise UserError(
            f"{source} does not fit the model: {'; '.join(problems)}. It was cut, or comes from a changed network."
        )
    sam.load_state_dict({key: state[key].to(value.dtype) for key, value in expected.items()}, strict=True)


def refuse_nonfinite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise a `UserError` that names the first tensor with values that are not finite."""
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{source}: {name} has values that are not finite, so the training diverged; use an earlier "
                "checkpoint (checkpoints/previous.ckpt), and lower optim.lr."
            )


def shortened(names: Collection[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - NAMES_IN_ERRORS} more" if len(names) > NAMES_IN_ERRORS else ""
    return ", ".join(list(names)[:NAMES_IN_ERRORS]) + more
