"""Checkpoints of others, brought into our format: Meta's, MedSAM2's and Hugging Face's, named by their keys.

What is read is only ever tensors and plain values. What does not fit is stated with counts and names; a network that is
not SAM 2 as Meta published it is refused, since its weights would load and give other masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medsam2.errors import UserError
from medsam2.export.formats.huggingface import HuggingFaceExporter
from medsam2.export.formats.huggingface_keys import from_huggingface
from medsam2.export.importing.sources import NetworkConfig, find_config, find_weights, read_config, read_weights
from medsam2.export.run import ExportResult, draft_folder, export_model, refuse_existing
from medsam2.export.verify.clip import ReferenceClip, reference_clip
from medsam2.export.verify.run import verify_export
from medsam2.model.build import LoadedModel, build_sam
from medsam2.model.checkpoint import TRANSFORMERS, load_strictly, recognise
from medsam2.model.provenance import Provenance
from medsam2.model.sizes import ModelSpec

MEDSAM2_SIDE = 512  # px, at which MedSAM2 (Ma et al. 2025, arXiv 2504.03600) trains
KINDS = {"official": "Meta's names", "huggingface": "transformers' names", "medsam2": "a checkpoint of medsam2"}


@dataclass(frozen=True, eq=False)
class ExternalCheckpoint:
    """A checkpoint of others under Meta's names.

    Attributes:
        model: the network, and what it said about itself (of ours alone) and where it comes from.
        kind: one of `KINDS`.
        notes: what was noticed on the way, for the user.
        folder: the Hugging Face folder, where transformers can load it.
    """

    model: LoadedModel
    kind: str
    notes: tuple[str, ...] = ()
    folder: Path | None = None

    def describe(self) -> str:
        """One line: what was recognised."""
        spec = self.model.spec
        return f"SAM {spec.version} {spec.name} at {spec.image_size} px ({KINDS[self.kind]})"


@dataclass(frozen=True)
class ImportResult:
    """What an import wrote; `transformers`: how transformers agrees, where the source is its own."""

    written: ExportResult
    external: ExternalCheckpoint
    transformers: Mapping[str, Any] = field(default_factory=dict)


def import_checkpoint(
    source: Path | str,
    out: Path | str,
    force: bool = False,
    verify: bool = True,
    image_size: int = 0,
    config: Path | None = None,
    case: str | ReferenceClip | None = None,
) -> ImportResult:
    """Write the checkpoint at `source` into `out` as official `.pt` and yaml, which everything of ours reads.

    Args:
        image_size: side of the model's input, px; 0 for what the files beside the weights say.
        config: a yaml of the network; by default the one beside the weights.
        verify: compare masks: with Meta's code after writing, and with transformers where the source is its own.
        case: what masks are compared on, see `export_model`.

    Raises:
        UserError: no SAM 2 in it, one that does not fit, a file that would have to be unpickled, or other masks.
    """
    out = Path(out)
    refuse_existing(out, force)
    external = read_external(Path(source).expanduser(), image_size, config)
    model, report = external.model, {}
    clip = reference_clip(case, model.spec.image_size) if verify else None
    if clip is not None and external.folder is not None:
        with draft_folder(out) as scratch:
            consumer = HuggingFaceExporter().load_as_consumer(model, external.folder, scratch)
            report = verify_export(consumer, model, clip, scratch)
    (written,) = export_model(model, "sam2", out, force=force, verify=verify, case=clip)
    return ImportResult(written, external, report)


def read_external(source: Path, image_size: int = 0, config: Path | None = None) -> ExternalCheckpoint:
    """The network at `source` with its weights, and what it is.

    Raises:
        UserError: see `import_checkpoint`.
    """
    if config is not None and not config.is_file():
        raise UserError(f"--config {config}: no such file.")
    path = find_weights(source)
    checkpoint, notes = read_weights(path)
    recognised, naming = recognise(checkpoint.state, path)
    kind = "huggingface" if naming == TRANSFORMERS else "official"
    config = config or find_config(path)
    stated = NetworkConfig()
    if config is not None and (config.suffix != ".json" or kind == "huggingface"):
        stated = read_config(config, recognised)
    side, note = _image_size(path, checkpoint.provenance, stated.image_size, image_size, recognised)
    spec = replace(recognised, image_size=side)
    sam, state = build_sam(spec), checkpoint.state
    if kind == "huggingface":
        state = from_huggingface(state, sam.state_dict(), str(path))
    load_strictly(sam, state, path)
    ours = checkpoint.provenance.spec is not None
    update = {"spec": spec} if ours else {"spec": spec, "imported": f"{path.name} ({kind})"}
    provenance = checkpoint.provenance.model_copy(update=update)
    # transformers computes at the side of its config.json, so at another one there is nothing to compare.
    comparable = kind == "huggingface" and config is not None and side == stated.image_size
    return ExternalCheckpoint(
        LoadedModel(sam.eval(), spec, provenance, str(source)),
        "medsam2" if ours else kind,
        (*notes, *stated.notes, *([note] if note else [])),
        path.parent if comparable else None,
    )


def _image_size(path: Path, provenance: Provenance, stated: int, asked: int, recognised: ModelSpec) -> tuple[int, str]:
    """Side of the input in px, and a note where it is not stated by the files. Weights are the same at every side."""
    known = provenance.spec.image_size if provenance.spec else stated
    if asked:
        return asked, f"the files say {known} px; {asked} px was asked for" if known not in (0, asked) else ""
    if known:
        return known, ""
    if "medsam2" in path.name.lower().replace("-", "").replace("_", ""):
        return MEDSAM2_SIDE, f"{MEDSAM2_SIDE} px, as the file's name says MedSAM2; if not, give --image-size"
    side = recognised.size.image_size
    return (
        side,
        f"{side} px is assumed: weights are the same at every side, and no configuration says; see --image-size",
    )
