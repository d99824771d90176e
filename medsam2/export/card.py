"""The README.md of an export: what it is and the lines that load it."""

from __future__ import annotations

from medsam2.export.verify import Verification
from medsam2.model.build import LoadedModel

OFFICIAL = """# {stem}

SAM {version} `{name}` at {px} px, {parameters:.1f} M parameters, written by medsam2 from `{source}`.

| file | what |
| --- | --- |
| `{stem}.pt` | float32 weights in the official format, `{{"model": state_dict}}` |
| `{stem}.yaml` | the network's configuration; needs no other file |
| `verify.json` | what the check measured |

## Load it with Meta's code (`pip install rf-sam-2`)

From this folder, for volumes and videos:

```python
import os
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from sam2.build_sam import build_sam2, build_sam2_video_predictor

GlobalHydra.instance().clear()
with initialize_config_dir(os.path.abspath("."), version_base="1.2"):
    predictor = build_sam2_video_predictor("{stem}.yaml", "{stem}.pt", device="cpu")
```

For single images{fix_note}:

```python
from sam2.sam2_image_predictor import SAM2ImagePredictor

with initialize_config_dir(os.path.abspath("."), version_base="1.2"):
    image_predictor = SAM2ImagePredictor(build_sam2("{stem}.yaml", "{stem}.pt", device="cpu"))
{fix}```

## Check

{check}

## Training data

{data}

## Intended use

Research on interactive segmentation of medical images. Not a medical device. The masks are proposals: somebody who can
judge them has to look at them.
"""
FIX = "image_predictor._bb_feat_sizes = [({0}, {0}), ({1}, {1}), ({2}, {2})]\n"


def official_card(stem: str, loaded: LoadedModel, check: Verification | None) -> str:
    """The text of README.md for the official format."""
    side = loaded.spec.image_size
    fixed = side == 1024
    return OFFICIAL.format(
        stem=stem,
        name=loaded.spec.name,
        version=loaded.spec.version,
        px=side,
        parameters=sum(parameter.numel() for parameter in loaded.sam.parameters()) / 1e6,
        source=loaded.source.replace("\\", "/").rsplit("/", 1)[-1],
        fix_note="" if fixed else " (the last line: the package hard-codes the sizes of 1024 px)",
        fix="" if fixed else FIX.format(side // 4, side // 8, side // 16),
        check=_describe(check),
        data=_training_data(loaded),
    )


def _training_data(loaded: LoadedModel) -> str:
    """The data sets that the checkpoint names, with source and licence; whoever ships the weights has to know them."""
    datasets = loaded.metadata.get("datasets") or {}
    if not datasets:
        return "The checkpoint names no data set."
    lines = ["| data set | source | licence |", "| --- | --- | --- |"]
    for name, said in sorted(datasets.items()):
        cells = (name, said.get("source") or "not stated", said.get("licence") or "not stated")
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _describe(check: Verification | None) -> str:
    if check is None:
        return "Not verified (`--no-verify`)."
    said = (
        f"Meta's video predictor loaded these files strictly and segmented {check.clip} ({check.frames} frames, "
        f"{check.objects} object{'s' if check.objects > 1 else ''}, box on one frame, propagated both ways)."
    )
    if not check.foreground:
        return f"{said} Neither it nor medsam2 found anything there, so equal masks prove little: check on `--case`."
    return (
        f"{said} Its masks overlap those of medsam2 by {check.iou:.5f} (IoU); largest difference of mask logits "
        f"{check.max_logit_difference:.2g}, of object scores {check.max_score_difference:.2g}."
    )
