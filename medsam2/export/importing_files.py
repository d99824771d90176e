"""Which files a checkpoint of others consists of, and its tensors without the prefixes of wrappers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsam2.errors import UserError
from medsam2.model import build

TORCH = (".pt", ".pth", ".ckpt", ".bin")
SHARDED = "model.safetensors.index.json"
IN_FOLDER = ("model.safetensors", SHARDED, "pytorch_model.bin")  # of transformers, in the order of preference


@dataclass(frozen=True)
class Found:
    """weights: the file with the tensors (or the index of several). config: the yaml or config.json beside, or None."""

    weights: Path
    config: Path | None


@dataclass(frozen=True, eq=False)
class Read:
    """Tensors by name, our own metadata if it is a file of ours, and what was taken off on the way."""

    state: dict[str, Tensor]
    metadata: dict[str, Any]
    notes: tuple[str, ...]


def find_files(source: Path, config: Path | None = None) -> Found:
    """The weights and the configuration at a path.

    Raises:
        UserError: nothing there, several candidates, a run of ours, or an adapter.
    """
    if config is not None and not config.is_file():
        raise UserError(f"--config {config}: no such file.")
    if source.is_dir():
        weights = _in_folder(source)
    elif source.is_file():
        weights = source
    else:
        raise UserError(f"{source} does not exist; give a file (.pt, .safetensors) or a folder of transformers.")
    if weights.name != SHARDED and weights.suffix not in (*TORCH, ".safetensors"):
        raise UserError(f"{weights} is of no known kind; give a {', '.join(TORCH)} or .safetensors file, or a folder.")
    return Found(weights, config or _config_beside(weights))


def _in_folder(folder: Path) -> Path:
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} is a run of medsam2: nothing to import. `medsam2 export -c {folder}` writes it out.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is an adapter: it needs its base. `medsam2 export -c {folder}` merges the two.")
    for name in IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    candidates = sorted(path for path in folder.iterdir() if path.suffix in (*TORCH, ".safetensors"))
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UserError(f"{folder} holds no weights: no {', '.join(IN_FOLDER)}, and no {', '.join(TORCH)} file.")
    names = ", ".join(path.name for path in candidates[:4])
    raise UserError(f"{folder} holds {len(candidates)} files of weights ({names}); give the one that is meant.")


def _config_beside(weights: Path) -> Path | None:
    """config.json beside the weights of transformers, or a yaml of the same stem."""
    for path in (weights.parent / "config.json", weights.with_suffix(".yaml")):
        if path.is_file() and (path.suffix == ".yaml" or weights.suffix in (".safetensors", ".json", ".bin")):
            return path
    return None


def read_tensors(found: Found) -> Read:
    """The tensors, without the prefixes of wrappers.

    Raises:
        UserError: the file is cut, of another kind, or holds more than tensors and plain values.
    """
    path, notes = found.weights, []
    if path.name == SHARDED:
        raw: Mapping[str, Any] = _read_shards(path)
        metadata: dict[str, Any] = {}
    elif path.suffix == ".safetensors":
        raw, metadata = build._read_safetensors(path)
    else:
        raw, metadata = build.read_torch(path)
        if _is_bare(path):
            notes.append("a bare state dict: Meta's code expects it under the key 'model', where it now is")
    state, prefix = _clean(raw)
    if prefix:
        notes.append(f"taken off every name: {prefix}")
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()} - {"float32"})
    if kinds:
        notes.append(f"stored as {', '.join(kinds)}, written as float32")
    return Read(state, metadata, tuple(notes))


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Weights that transformers spread over several files."""
    try:
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is not an index of safetensors files ({error}); download it again.") from None
    state: dict[str, Tensor] = {}
    for name in names:
        part = index.parent / Path(name).name  # a name in the index leads nowhere else
        if not part.is_file():
            raise UserError(f"{index} names {name}, which is not beside it; download all parts.")
        state |= build._read_safetensors(part)[0]
    return state


def _is_bare(path: Path) -> bool:
    """Whether the tensors of a .pt lie at the top: only asked of a file that `read_torch` has read."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return not any(isinstance(content.get(key), dict) for key in ("model", "state_dict"))


def _clean(raw: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """`build.clean_state`, for names of transformers too, and the prefixes that were taken off, in words."""
    taken = []
    if any("_orig_mod." in key for key in raw):
        taken.append("'_orig_mod.' (torch.compile)")
    names = {key.replace("_orig_mod.", ""): value for key, value in raw.items() if key != "n_averaged"}
    for first in (build.FIRST_WEIGHT, build.TRANSFORMERS_WEIGHT):
        stem = next((key for key in names if key.endswith(first)), None)
        if stem is None:
            continue
        prefix = stem.removesuffix(first)
        if prefix:
            taken.append(f"'{prefix}'" + (" (a distributed or averaged model)" if prefix == "module." else ""))
        own = {key.removeprefix(prefix): value for key, value in names.items() if key.startswith(prefix)}
        return {key: value for key, value in own.items() if isinstance(value, Tensor)}, " and ".join(taken)
    return {key: value for key, value in names.items() if isinstance(value, Tensor)}, " and ".join(taken)
