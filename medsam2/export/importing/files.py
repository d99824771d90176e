"""Which files a checkpoint of others consists of, and its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from medsam2.errors import UserError
from medsam2.model.checkpoint import Checkpoint, read_checkpoint
from medsam2.model.provenance import Provenance

TORCH_ENDINGS = (".pt", ".pth", ".ckpt", ".bin")
SHARDED = "model.safetensors.index.json"
NAMES_IN_FOLDER = ("model.safetensors", SHARDED, "pytorch_model.bin")  # of transformers, in the order of preference


@dataclass(frozen=True)
class Files:
    """weights: the file with the tensors (or the index of several). config: the yaml or config.json beside, or None."""

    weights: Path
    config: Path | None


def find_files(source: Path, config: Path | None = None) -> Files:
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
    if weights.name != SHARDED and weights.suffix not in (*TORCH_ENDINGS, ".safetensors"):
        raise UserError(
            f"{weights} is of no known kind; give a {', '.join(TORCH_ENDINGS)} or .safetensors file, or a folder."
        )
    return Files(weights, config or _config_beside(weights))


def _in_folder(folder: Path) -> Path:
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} is a run of medsam2: nothing to import. `medsam2 export -c {folder}` writes it out.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is an adapter: it needs its base. `medsam2 export -c {folder}` merges the two.")
    for name in NAMES_IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    candidates = sorted(path for path in folder.iterdir() if path.suffix in (*TORCH_ENDINGS, ".safetensors"))
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UserError(
            f"{folder} holds no weights: no {', '.join(NAMES_IN_FOLDER)}, and no {', '.join(TORCH_ENDINGS)} file."
        )
    names = ", ".join(path.name for path in candidates[:4])
    raise UserError(f"{folder} holds {len(candidates)} files of weights ({names}); give the one that is meant.")


def _config_beside(weights: Path) -> Path | None:
    """config.json beside the weights of transformers, or a yaml of the same stem."""
    for path in (weights.parent / "config.json", weights.with_suffix(".yaml")):
        if path.is_file() and (path.suffix == ".yaml" or weights.suffix in (".safetensors", ".json", ".bin")):
            return path
    return None


def read_weights(files: Files) -> tuple[Checkpoint, tuple[str, ...]]:
    """The weights, and notes for the user about what was taken off or changed.

    Raises:
        UserError: see `read_checkpoint`.
    """
    path = files.weights
    checkpoint = _read_sharded(path) if path.name == SHARDED else read_checkpoint(path)
    notes = []
    if checkpoint.bare:
        notes.append("a bare state dict: Meta's code expects it under the key 'model', where it now is")
    if checkpoint.wrappers:
        notes.append(f"taken off every name: {' and '.join(checkpoint.wrappers)}")
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in checkpoint.state.values()} - {"float32"})
    if dtypes:
        notes.append(f"stored as {', '.join(dtypes)}, written as float32")
    return checkpoint, tuple(notes)


def _read_sharded(index: Path) -> Checkpoint:
    """Weights that transformers spread over several files."""
    try:
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of safetensors files ({error}); download it again.") from None
    state: dict[str, Tensor] = {}
    for name in names:
        part = index.parent / Path(str(name)).name  # a name in the index leads nowhere else
        if not part.is_file():
            raise UserError(f"{index} names {name}, which is not beside it; download all parts.")
        state |= read_checkpoint(part).state
    return Checkpoint(state, Provenance())
