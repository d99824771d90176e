"""The adapter of a run in peft's format: megabytes that plain peft loads onto the base that they belong to."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medsam2.errors import UserError
from medsam2.export import official
from medsam2.export.card_scores import scores_section
from medsam2.export.expected import compared, items_of, refuse_other_masks, run_consumer, together
from medsam2.export.run import file_stem, reference_clip, refuse_existing, write_folder
from medsam2.export.targets import ExportResult
from medsam2.export.verify import AGREEMENT, ReferenceClip
from medsam2.model import build
from medsam2.model.adapter import AdapterRecord, restore_adapted, save_adapter
from medsam2.model.build import LoadedModel, ModelSpec
from medsam2.model.lora import adapter_names, base_state, is_adapted, official_name

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

TARGET = "adapter"  # the run's LoRA (or other) adapter in peft's format, without the base weights

CARD = """# Adapter for SAM {version} `{name}` at {px} px

`{method}` by medsam2, {size:.2f} MB, {parameters:,} parameters. It belongs to the weights `{base}`
(sha256 of the tensors `{sha256}`); on any other its masks would be wrong, and medsam2 refuses that.

| file | what |
| --- | --- |
| `adapter_config.json`, `adapter_model.safetensors` | peft's format |
| `medsam2.json` | base, settings, content hashes of the training cases |
| `verify.json` | what the check measured |

With plain peft (`model` is a SAM 2 that holds the base weights, e.g. from `sam2.build_sam.build_sam2`):

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "{folder}").merge_and_unload()
```

{check}
"""


@dataclass(frozen=True)
class Adapted:
    """A network with its adapter in place, and what its checkpoint said about itself."""

    sam: SAM2Base
    spec: ModelSpec
    metadata: dict[str, Any]
    source: str


def export(
    checkpoint: str | Path | LoadedModel,
    out: Path | str,
    force: bool = False,
    verify: bool = True,
    case: str | ReferenceClip | None = None,
    scores: Path | None = None,
) -> ExportResult:
    """Write peft's two files, medsam2.json, README.md and verify.json into `out`, once plain peft gives our masks.

    Raises:
        UserError: the run has no adapter, its weights are not finite, `out` is not empty (without `force`), or peft
            gives other masks.
    """
    out = Path(out)
    refuse_existing(out, force)
    if isinstance(checkpoint, LoadedModel):
        _refuse_variant(checkpoint)
        checkpoint = checkpoint.source
    adapted = read_adapted(checkpoint)
    record = _record(adapted)
    scored = f"\n## Scores\n\n{scores_section(build.load_model(adapted.source), scores)}\n" if scores else ""

    def write(folder: Path) -> None:
        save_adapter(folder, adapted.sam, record)

    def check(folder: Path) -> Mapping[str, Any]:
        return verify_adapter(folder, adapted, reference_clip(case, adapted.spec.image_size))

    def describe(found: Mapping[str, Any] | None) -> str:
        return _card(adapted, record, out.name, found) + scored

    return write_folder(out, force, write, check if verify else None, describe)


def _refuse_variant(loaded: LoadedModel) -> None:
    said = loaded.metadata
    if "dtype" in said or "trained_image_size" in said or str(said.get("weights", "")).startswith("of the last step"):
        raise UserError(
            "--to adapter writes the adapter as the checkpoint has it: leave out --weights raw, --dtype and "
            "--image-size."
        )


def read_adapted(checkpoint: str | Path) -> Adapted:
    """The network of a run that trained an adapter, with the adapter still apart.

    Raises:
        UserError: no such checkpoint, or its run had no adapter.
    """
    path = build.find_checkpoint(str(checkpoint))
    content: tuple[Any, dict[str, Any]] = ({}, {})
    if path.suffix != ".safetensors":  # those of ours are whole models
        content = build.read_torch(path)
    state, metadata = build.clean_state(content[0]), content[1]
    if not is_adapted(state):
        raise UserError(
            f"{checkpoint} has no adapter: it holds a whole model. Export it with --to sam2, or train with an adapter "
            "(adaptation=lora_encoder)."
        )
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: {name} has values that are not finite; export an earlier checkpoint.")
    if "spec" not in metadata or "adapter" not in metadata:
        raise UserError(f"{path} does not say how its adapter was made; give the checkpoint that the run wrote.")
    spec = ModelSpec.from_dict(metadata["spec"])
    sam = build.build_sam(spec)
    restore_adapted(sam, state, metadata, str(path))
    return Adapted(sam.eval(), spec, metadata, str(path))


def verify_adapter(folder: Path, adapted: Adapted, clip: ReferenceClip) -> dict[str, Any]:
    """Load `folder` with plain peft onto Meta's network in a process of its own, merge it there, and compare masks.

    What was trained in full is wiped from the base first, so that it can come from the adapter's files alone.

    Returns:
        JSON values of `expected.together`.

    Raises:
        UserError: peft does not load the files, or the masks overlap less than `AGREEMENT`.
    """
    base = build.build_sam(adapted.spec)
    state = base_state(adapted.sam)
    own = adapter_names([name for name, _ in adapted.sam.named_parameters()])
    for name, parameter in adapted.sam.named_parameters():
        if parameter.requires_grad and name not in own:
            state[official_name(name)] = torch.zeros_like(parameter)
    base.load_state_dict(state)
    started = LoadedModel(base, adapted.spec, {}, adapted.source)
    merged = build.load_model(adapted.source, adapted.spec)
    items = items_of(merged, clip, torch.bfloat16)
    with tempfile.TemporaryDirectory() as place:
        official.write_model(started, Path(place))
        files = [Path(place) / f"{file_stem(started)}{ending}" for ending in (".yaml", ".pt")]
        shared = official.shared_tensors(clip, adapted.spec)
        try:
            answers = run_consumer(official.CONSUMER, [*files, folder], items, shared)
        except UserError as error:
            raise UserError(f"peft does not load the adapter of {adapted.source}: {error}") from None
    found = compared(items, answers, clip)
    refuse_other_masks(items, found, "peft's", adapted.source, "Please report it with the run's config.yaml.")
    return {
        **together(items, found),
        "loaded": "by plain peft onto Meta's network in a process without medsam2",
        "tolerances": {"iou": AGREEMENT},
    }


def _record(adapted: Adapted) -> AdapterRecord:
    said = adapted.metadata
    return AdapterRecord(
        base=said["adapter"]["base"],
        spec=adapted.spec.to_dict(),
        adaptation=said["adapter"]["adaptation"],
        content_hashes=tuple(said.get("content_hashes") or ()),
        datasets=said.get("datasets") or {},
        step=int(said.get("step") or 0),
    )


def _card(adapted: Adapted, record: AdapterRecord, folder: str, found: Mapping[str, Any] | None) -> str:
    assert record.adaptation.peft is not None
    trained = [parameter for parameter in adapted.sam.parameters() if parameter.requires_grad]
    said = "Not verified (`--no-verify`)."
    if found is not None:
        said = (
            f"Plain peft loaded and merged these files; on {found['clip']} its masks overlap those of the trained "
            f"model by {found['iou']:.5f} (IoU), largest difference of mask logits {found['max_logit_difference']:.2g}."
        )
    return CARD.format(
        version=adapted.spec.version,
        name=adapted.spec.name,
        px=adapted.spec.image_size,
        method=record.adaptation.peft.method,
        size=sum(parameter.nbytes for parameter in trained) / 1e6,
        parameters=sum(parameter.numel() for parameter in trained),
        base=record.base.file,
        sha256=record.base.sha256,
        folder=folder,
        check=said,
    )
