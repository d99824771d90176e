"""The adapter of a run in peft's format: megabytes that plain peft loads onto the base that they belong to."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medsam2.errors import UserError
from medsam2.evaluation.predictor import Predictor
from medsam2.export.targets import ExportResult
from medsam2.export.verify import AGREEMENT, ReferenceClip, Verification, clip_of_case, compare, generated_clip
from medsam2.files import atomic_write, new_folder, sync_folder
from medsam2.model import build
from medsam2.model.adapter import AdapterRecord, restore_adapted, save_adapter
from medsam2.model.build import ModelSpec
from medsam2.model.lora import adapter_names, base_state, is_adapted, official_name
from medsam2.model.tracker import Tracker

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
    checkpoint: str, out: Path, force: bool = False, verify: bool = True, case: str | None = None
) -> ExportResult:
    """`export_adapter` under the name that `targets.py` looks for."""
    return export_adapter(checkpoint, out, force, verify, clip_of_case(case) if case else None)


def export_adapter(
    checkpoint: str | Path, out: Path | str, force: bool = False, verify: bool = True, clip: ReferenceClip | None = None
) -> ExportResult:
    """Write peft's two files, medsam2.json and README.md into `out`, once plain peft has given our masks.

    Raises:
        UserError: the run has no adapter, its weights are not finite, `out` is not empty (without `force`), or peft
            gives other masks.
    """
    out = Path(out)
    if not force and out.exists():
        new_folder(out)  # refuses what is not empty before the work, not after it
    adapted = read_adapted(checkpoint)
    record = _record(adapted)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        names = save_adapter(draft, adapted.sam, record)
        check = verify_adapter(draft, adapted, clip or generated_clip()) if verify else None
        with atomic_write(draft / "README.md") as file:
            file.write(_card(adapted, record, draft, out.name, check).encode())
        new_folder(out, force)
        files = tuple(sorted((*names, "README.md")))
        for name in files:
            os.replace(draft / name, out / name)
        sync_folder(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return ExportResult(out, files, verify, check.to_dict() if check else {})


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


def verify_adapter(folder: Path, adapted: Adapted, clip: ReferenceClip) -> Verification:
    """Load `folder` with plain peft, merge it there, and compare masks on `clip` with the model that was trained.

    What was trained in full is wiped from the base first, so that it can come from the adapter's files alone.

    Raises:
        UserError: peft does not load the files, or the masks overlap less than `AGREEMENT`.
    """
    from peft import PeftModel

    base = build.build_sam(adapted.spec)
    state = base_state(adapted.sam)
    own = adapter_names([name for name, _ in adapted.sam.named_parameters()])
    for name, parameter in adapted.sam.named_parameters():
        if parameter.requires_grad and name not in own:
            state[official_name(name)] = torch.zeros_like(parameter)
    base.load_state_dict(state)
    try:
        merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"peft does not load the adapter of {adapted.source}: {error}") from error
    mine, theirs = (
        Predictor(Tracker(model.eval())).predict(clip.frames, clip.prompts, "both", logits=True)
        for model in (adapted.sam, merged)
    )
    assert mine.logits is not None and theirs.logits is not None
    result = compare(mine.logits, theirs.logits, mine.scores, theirs.scores, clip)
    if not result.passed:
        raise UserError(
            f"export of {adapted.source}: with peft the masks overlap ours by only {result.iou:.4f} on {clip.name} (at "
            f"least {AGREEMENT} is asked); nothing was written. Please report it with the run's config.yaml."
        )
    return result


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


def _card(adapted: Adapted, record: AdapterRecord, draft: Path, folder: str, check: Verification | None) -> str:
    assert record.adaptation.peft is not None
    said = "Not verified (`--no-verify`)."
    if check is not None:
        said = (
            f"Plain peft loaded and merged these files; on {check.clip} its masks overlap those of the trained model "
            f"by {check.iou:.5f} (IoU), largest difference of mask logits {check.max_logit_difference:.2g}."
        )
    return CARD.format(
        version=adapted.spec.version,
        name=adapted.spec.name,
        px=adapted.spec.image_size,
        method=record.adaptation.peft.method,
        size=sum(path.stat().st_size for path in draft.iterdir()) / 1e6,
        parameters=sum(p.numel() for p in adapted.sam.parameters() if p.requires_grad),
        base=record.base.file,
        sha256=record.base.sha256,
        folder=folder,
        check=said,
    )
