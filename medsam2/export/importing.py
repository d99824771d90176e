"""Checkpoints of others, brought into our format: Meta's, MedSAM2's and Hugging Face's, named by their keys.

What is read is only ever tensors and plain values. What does not fit is said with counts and names; a network that is
not SAM 2 as Meta published it is refused, since its weights would load and give other masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from medsam2.errors import UserError
from medsam2.export import official
from medsam2.export.huggingface_check import verify_huggingface
from medsam2.export.huggingface_keys import from_huggingface
from medsam2.export.importing_config import Said, read_config
from medsam2.export.importing_files import Found, find_files, read_tensors
from medsam2.export.run import reference_clip, refuse_existing
from medsam2.export.targets import ExportResult
from medsam2.export.verify import ReferenceClip
from medsam2.model import build
from medsam2.model.build import LoadedModel, ModelSpec
from medsam2.model.sizes import SIZES

VERSION_KEYS = {"official": "no_obj_embed_spatial", "huggingface": "occlusion_spatial_embedding_parameter"}
NAMED = 3  # of the keys that do not fit
MEDSAM2_SIDE = 512  # what MedSAM2 (Ma et al. 2025, arXiv 2504.03600) trains at
OTHER_NETWORKS = {
    "image_encoder.blocks.0.attn.qkv.weight": "a SAM 1, as MedSAM is",
    "vision_encoder.layers.0.attn.qkv.weight": "a SAM 1 of transformers (SamModel)",
}


@dataclass(frozen=True, eq=False)
class Foreign:
    """A checkpoint of others under Meta's names.

    Attributes:
        state: float32, complete. spec: what it is. kind: "official", "huggingface" or "medsam2".
        metadata: what it said about itself (of ours alone), and where it comes from.
        notes: what was found on the way, for the user.
        folder: the Hugging Face folder, where transformers can load it.
    """

    state: dict[str, Tensor]
    spec: ModelSpec
    kind: str
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()
    folder: Path | None = None


@dataclass(frozen=True)
class ImportResult:
    """What an import wrote, and what it found out. theirs: how transformers agrees, where the source is theirs."""

    written: ExportResult
    spec: ModelSpec
    kind: str
    notes: tuple[str, ...]
    theirs: dict[str, Any] = field(default_factory=dict)


def import_checkpoint(
    source: Path | str,
    out: Path | str,
    force: bool = False,
    verify: bool = True,
    image_size: int = 0,
    config: Path | None = None,
    clip: ReferenceClip | None = None,
) -> ImportResult:
    """Write the checkpoint at `source` into `out` as official `.pt` and yaml, which everything of ours reads.

    Args:
        image_size: side of the model's input, px; 0 for what the files beside the weights say.
        config: a yaml of the network; by default the one beside the weights.
        verify: compare masks: with Meta's code after writing, and with transformers where the source is theirs.

    Raises:
        UserError: no SAM 2 in it, one that does not fit, a file that would have to be unpickled, or other masks.
    """
    refuse_existing(Path(out), force)
    foreign = read_foreign(Path(source).expanduser(), image_size, config)
    sam = build.build_sam(foreign.spec)
    sam.load_state_dict(foreign.state, strict=True)
    loaded = LoadedModel(sam.eval(), foreign.spec, foreign.metadata, str(source))
    theirs: dict[str, Any] = {}
    if verify and foreign.folder is not None:
        theirs = verify_huggingface(loaded, foreign.folder, reference_clip(clip, foreign.spec.image_size))
    written = official.export(loaded, out, force, verify, clip)
    return ImportResult(written, foreign.spec, foreign.kind, foreign.notes, theirs)


def read_foreign(source: Path, image_size: int = 0, config: Path | None = None) -> Foreign:
    """The weights at `source` under Meta's names, and what they are.

    Raises:
        UserError: see `import_checkpoint`.
    """
    found = find_files(source, config)
    read = read_tensors(found)
    notes = [*read.notes]
    kind = _kind(read.state, found)
    name, version = _recognise(read.state, kind, found)
    said = read_config(found, kind, ModelSpec(name, version))
    _refuse_other_version(version, said, found)
    notes += said.notes
    side, why = _side(found, read.metadata, said, image_size, name)
    notes += [why] if why else []
    spec = ModelSpec(name, version, side)
    own = build.build_sam(spec).state_dict()
    state = read.state
    if kind == "huggingface":
        state = from_huggingface(state, own, str(found.weights))
    _refuse_misfit(own, state, spec, found)
    kept = {key: state[key].detach().cpu().to(own[key].dtype).contiguous() for key in own}
    metadata = {**read.metadata, "spec": spec.to_dict()}
    if "spec" not in read.metadata:
        metadata["imported"] = f"{found.weights.name} ({kind})"
    # transformers computes at the side of its config.json, so at another one there is nothing to compare
    whole = kind == "huggingface" and found.config is not None and side == said.image_size
    return Foreign(
        kept,
        spec,
        "medsam2" if "spec" in read.metadata else kind,
        metadata,
        tuple(notes),
        found.weights.parent if whole else None,
    )


# ---------------------------------------------------------------------------------------------------- what it is


def _kind(state: Mapping[str, Tensor], found: Found) -> str:
    """Whose names these are.

    Raises:
        UserError: nobody's that we know.
    """
    if build.FIRST_WEIGHT in state:
        return "official"
    if build.TRANSFORMERS_WEIGHT in state:
        return "huggingface"
    for key, what in OTHER_NETWORKS.items():
        if any(name.endswith(key) for name in state):
            raise UserError(f"{found.weights} is {what}, not a SAM 2: its weights have no place here.")
    first = ", ".join(list(state)[:NAMED])
    raise UserError(
        f"{found.weights} holds no SAM 2: of its {len(state)} tensors none is {build.FIRST_WEIGHT} (Meta's name) or "
        f"{build.TRANSFORMERS_WEIGHT} (transformers'); it begins with {first or 'nothing'}."
    )


def _recognise(state: Mapping[str, Tensor], kind: str, found: Found) -> tuple[str, str]:
    """Name and version of the network, by the width and number of Hiera's blocks and by what 2.1 added.

    Raises:
        UserError: a size that Meta did not publish.
    """
    first, stem, place = (
        (build.FIRST_WEIGHT, "image_encoder.trunk.blocks.", 3)
        if kind == "official"
        else (build.TRANSFORMERS_WEIGHT, "vision_encoder.backbone.blocks.", 3)
    )
    width = state[first].shape[0]
    blocks = len({key.split(".")[place] for key in state if key.startswith(stem)})
    for size in SIZES.values():
        if (size.embed_dim, size.blocks) == (width, blocks):
            version = "2.1" if VERSION_KEYS[kind] in state else "2.0"
            if version not in size.parameters:
                raise UserError(
                    f"{found.weights} is a {size.name} without {VERSION_KEYS[kind]}; it exists as "
                    f"{', '.join(size.parameters)} only: is the file cut, or from another tool?"
                )
            return size.name, version
    raise UserError(
        f"{found.weights} is a SAM 2 of a size that medsam2 does not know (first width {width}, {blocks} blocks); "
        f"known: {', '.join(f'{s.name} ({s.embed_dim}, {s.blocks})' for s in SIZES.values())}."
    )


def _refuse_other_version(version: str, said: Said, found: Found) -> None:
    if not said.version or said.version == version:
        return
    raise UserError(
        f"{found.weights} holds SAM {version} weights ({'with' if version == '2.1' else 'without'} "
        f"no_obj_embed_spatial and obj_ptr_tpos_proj), but {said.source} describes SAM {said.version}: they do not "
        f"belong together. Give the configuration of {version} with --config, or move the file out of the folder."
    )


def _side(found: Found, metadata: Mapping[str, Any], said: Said, given: int, name: str) -> tuple[int, str]:
    """Side of the input in px, and a note where it is not stated by the files. Weights are the same at every side."""
    spec = metadata.get("spec")
    known = int(spec["image_size"]) if isinstance(spec, Mapping) and spec.get("image_size") else said.image_size
    if given:
        note = f"the files say {known} px; {given} px was asked for" if known and known != given else ""
        return given, note
    if known:
        return known, ""
    if "medsam2" in found.weights.name.lower().replace("-", "").replace("_", ""):
        return MEDSAM2_SIDE, f"{MEDSAM2_SIDE} px, as the file's name says MedSAM2; if not, give --image-size"
    side = SIZES[name].image_size
    return (
        side,
        f"{side} px is assumed: weights are the same at every side, and no configuration says; see --image-size",
    )


def _refuse_misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], spec: ModelSpec, found: Found) -> None:
    """Everything that does not fit, in one message.

    Raises:
        UserError: a tensor is missing, one too many, of another shape, or not of numbers.
    """
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    said = []
    if missing:
        said.append(f"it lacks {len(missing)} of {len(own)} tensors ({_few(missing)})")
    if extra:
        said.append(f"it has {len(extra)} more ({_few(extra)})")
    if shapes:
        named = [f"{key}: {list(state[key].shape)} instead of {list(own[key].shape)}" for key in shapes]
        said.append(f"{len(shapes)} {'has' if len(shapes) == 1 else 'have'} another shape ({_few(named)})")
    if said:
        raise UserError(
            f"{found.weights} looks like {spec.name} {spec.version}, but does not fit: {'; '.join(said)}. It was "
            "cut, or comes from a changed network."
        )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def describe(result: ImportResult) -> str:
    """One line: what was recognised."""
    whose = {"official": "Meta's names", "huggingface": "transformers' names", "medsam2": "a checkpoint of medsam2"}
    return f"SAM {result.spec.version} {result.spec.name} at {result.spec.image_size} px ({whose[result.kind]})"
