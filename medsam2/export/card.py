"""The README.md of an export, a model card of one form for every format.

What it says comes from the checkpoint (data sets, recipe, prompts), from the check that the export has just passed, and
from an evaluation folder where one is given. What nobody stated is named as not stated, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsam2.export.card_scores import scores_section
from medsam2.files import file_name
from medsam2.model.build import LoadedModel


@dataclass(frozen=True)
class Format:
    """What a card says about a format: whom it is for, and how model hubs call the library that loads it."""

    title: str
    library: str
    tags: tuple[str, ...] = ()


FORMATS = {
    "sam2": Format("Meta's code and the tools built on it", "sam2"),
    "huggingface": Format("transformers (`Sam2VideoModel`, `Sam2Model`)", "transformers", ("safetensors",)),
    "onnx": Format("ONNX Runtime, without PyTorch", "onnxruntime", ("onnx",)),
    "torch": Format("torch.export, without this package", "pytorch"),
    "adapter": Format("peft", "peft", ("lora",)),
    "release": Format("the programs below", "sam2", ("safetensors", "onnx")),
}
TAGS = ("medical-imaging", "segmentation", "sam2", "medsam2")
PERMISSIVE = {"apache-2.0", "cc0-1.0", "cc0", "cc-by-4.0", "mit", "bsd-3-clause", "public domain"}
OPEN = "apache-2.0"  # Meta's weights, and this package
LICENCES = {OPEN: "Apache-2.0", "mit": "MIT"}  # as people write them
KINDS = {
    "mask": "mask of one frame", "box": "box", "click": "one click", "points": "several points",
    "box_click": "box and click", "recist": "RECIST line", "recist_box": "box around a RECIST line",
    "scribble": "scribble",
}  # fmt: skip

TEMPLATE = """{front}
# SAM {version} `{name}` at {px} px, for {title}

{parameters:.1f} M parameters, written by medsam2 from `{source}`. It outlines one object a prompt (a box, clicks or
a mask on one slice or frame) and follows it through a volume or a video; it does not name what it outlines.

{files}{usage}## Check

{check}

## Training data

{data}

## Recipe

{recipe}

## Prompts

{prompts}

## Scores

{scores}

## Intended use and limits

Research on interactive segmentation of medical images. **Not a medical device**: the masks are proposals, and somebody
who can judge them has to look at them.

- Images are given as 8-bit pictures: CT clipped to a window, MR and PET scaled by percentiles, as in training. Other
  windows give other masks.
- Everything is resized to {px} x {px} px. What is a few pixels wide there is easily missed.
- On modalities, organs and devices that are not under "Training data" nothing is known; evaluate before use.
- An object that leaves and comes back, and objects that touch, are where following goes wrong most often.

## Licence

{licence}
"""


def card(
    format: str,
    loaded: LoadedModel,
    verification: Mapping[str, Any] | None,
    scores: Path | None = None,
    *,
    files: Mapping[str, str] | None = None,
    usage: str = "",
    check: str = "",
) -> str:
    """The text of README.md.

    Args:
        format: the name of the target ("sam2", "huggingface" ...), or "release"; an unknown one is called by its name.
        loaded: the network that was exported, and what its checkpoint says about itself.
        verification: what the check measured, or None (or {"verified": False}) where it was left out.
        scores: an evaluation folder of these very weights.
        files: what each file of the folder is, by its name. usage: Markdown with the lines that load it.
        check: Markdown in the place of what `verification` would give.

    Raises:
        UserError: the scores are not an evaluation, or one of other weights.
    """
    about = FORMATS.get(format, Format(f"`{format}`", format))
    table = [f"| `{name}` | {what} |" for name, what in (files or {}).items()]
    return TEMPLATE.format(
        front=_front_matter(about, loaded),
        version=loaded.spec.version,
        name=loaded.spec.name,
        px=loaded.spec.image_size,
        title=about.title,
        parameters=sum(parameter.numel() for parameter in loaded.sam.parameters()) / 1e6,
        source=file_name(loaded.source),
        files="\n".join(["| file | what |", "| --- | --- |", *table, "", ""]) if table else "",
        usage=f"## Use\n\n{usage.strip()}\n\n" if usage else "",
        check=check or describe_check(verification),
        data=_data(loaded.metadata),
        recipe=_recipe(loaded),
        prompts=_prompts(loaded.metadata),
        scores=scores_section(loaded, scores),
        licence=_licence_text(loaded.metadata),
    )


# ------------------------------------------------------------------------------------------------------- the parts


def _front_matter(about: Format, loaded: LoadedModel) -> str:
    """The YAML at the top, which model hubs read."""
    import yaml

    name = licence(loaded.metadata)
    said: dict[str, Any] = {"license": name}
    if name == "other":
        said |= {"license_name": "see-the-licences-of-the-data-sets", "license_link": "README.md#licence"}
    said |= {
        "library_name": about.library,
        "pipeline_tag": "mask-generation",
        "tags": [*TAGS, *about.tags],
    }
    start = file_name(str(loaded.metadata.get("start") or ""))
    if loaded.spec.size.url(loaded.spec.version) and start == loaded.spec.size.file_name(loaded.spec.version):
        said["base_model"] = f"facebook/{start.removesuffix('.pt').replace('_', '-')}"
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}---\n"


def licence(metadata: Mapping[str, Any]) -> str:
    """The hub's name of the licence: that of the checkpoint, Apache-2.0 where all data allow it, else "other"."""
    if metadata.get("licence"):
        return str(metadata["licence"]).lower()
    datasets = metadata.get("datasets") or {}
    stated = {str(said.get("licence") or "").strip().lower() for said in datasets.values()}
    return OPEN if datasets and stated <= PERMISSIVE else "other"


def _licence_text(metadata: Mapping[str, Any]) -> str:
    name = licence(metadata)
    if name != "other":
        return f"{LICENCES.get(name, name)}, as Meta's SAM 2 and medsam2."
    return (
        "The network and Meta's weights are Apache-2.0. These weights also come from the data sets above, and their "
        "licences (or that none is stated) decide who may use them for what; whoever passes them on has to settle that."
    )


def _data(metadata: Mapping[str, Any]) -> str:
    """The data sets that the checkpoint names, with source and licence; whoever ships the weights has to know them."""
    datasets = metadata.get("datasets") or {}
    if not datasets:
        said = metadata.get("data")
        return f"{said}." if said else "The checkpoint names no data set."
    lines = ["| data set | source | licence |", "| --- | --- | --- |"]
    for name, said in sorted(datasets.items()):
        lines.append(_row(name, said.get("source") or "not stated", said.get("licence") or "not stated"))
    known = len(metadata.get("content_hashes") or ())
    if known:
        lines += [
            "",
            f"The checkpoint knows its {known} training cases: medsam2 marks them in an evaluation.",
        ]
    return "\n".join(lines)


def _recipe(loaded: LoadedModel) -> str:
    """How the weights came about, as far as the checkpoint says."""
    said = loaded.metadata
    recipe = said.get("recipe") if isinstance(said.get("recipe"), Mapping) else {}
    assert isinstance(recipe, Mapping)
    optim, adaptation = recipe.get("optim") or {}, recipe.get("adaptation") or {}
    step = said.get("step") or said.get("steps_of_last_phase")
    rows = {
        "started from": file_name(str(said.get("start") or "")),
        "configuration": recipe.get("file"),
        "optimiser steps": step,
        "trained": _trained(adaptation),
        "learning rate": optim.get("lr"),
        "weight decay": optim.get("weight_decay"),
        "kept of the old": _kept(recipe.get("keep") or {}),
        "interpolated": f"{said['interpolated']:g} of the way from start to end" if "interpolated" in said else None,
        "weights": said.get("weights"),
        "imported from": said.get("imported"),
        "seed": said.get("seed"),
        "commit": said.get("commit"),
    }
    known = {name: value for name, value in rows.items() if value not in (None, "", "random")}
    if not known:
        return "The checkpoint does not say how it was trained."
    return "\n".join(["| | |", "| --- | --- |", *(_row(name, str(value)) for name, value in known.items())])


def _trained(adaptation: Mapping[str, Any]) -> str:
    peft = adaptation.get("peft")
    parts = ", ".join(map(str, adaptation.get("train") or ()))
    if not peft:
        return parts
    return f"{peft.get('method')} of rank {peft.get('r')} on {', '.join(peft.get('targets') or ())}, merged here"


def _kept(keep: Mapping[str, Any]) -> str:
    """What was done against forgetting: the settings that are on."""
    return ", ".join(f"{name} {value}" for name, value in keep.items() if value and name in ("l2", "distillation"))


def _prompts(metadata: Mapping[str, Any]) -> str:
    """Which prompts it was trained with: others may be given, and are not what it was made for."""
    from medsam2.prompts.settings import PromptSettings

    recipe = metadata.get("recipe")
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("prompts"), Mapping):
        return (
            "The checkpoint does not say which prompts it was trained with. The network takes boxes, positive and "
            "negative points and masks, on one or several frames."
        )
    settings = PromptSettings.model_validate(dict(recipe["prompts"]))
    total = sum(settings.kinds.values()) or 1.0
    lines = ["| prompt | share of the training |", "| --- | --- |"]
    for kind, weight in settings.kinds.items():
        share = f"{100 * weight / total:.0f} %" if weight else "none: do not rely on it"
        lines.append(_row(KINDS.get(kind, kind), share))
    corrected = settings.corrections * bool(settings.correction_frames) * (settings.correction_probability > 0)
    clicks = f"up to {settings.corrections} on a frame" if corrected else "none: do not rely on it"
    lines.append(_row("correction clicks, positive and negative", clicks))
    return "\n".join(lines)


def describe_check(verification: Mapping[str, Any] | None) -> str:
    """What was run to prove the export, or that nothing was."""
    if not verification or verification.get("verified") is False:
        return "Not verified (`--no-verify`)."
    found, objects = verification, int(verification["objects"])
    said = (
        f"The files were loaded {found.get('loaded', 'by their consumer')}, and run on {found['clip']}, with {objects} "
        f"object{'s' if objects > 1 else ''}."
    )
    if not found.get("foreground"):
        return f"{said} Neither they nor medsam2 found anything there, so equal masks prove little: check on `--case`."
    said += (
        f" The masks overlap those of medsam2 by {found['iou']:.5f} (IoU); the largest difference of mask logits is "
        f"{found['max_logit_difference']:.2g}, of object scores {found['max_score_difference']:.2g}."
    )
    items = found.get("items")
    if not items:
        return said
    lines = ["", "", "| | largest difference of logits | overlap of the masks |", "| --- | --- | --- |"]
    lines += [_row(name, f"{one['max_logit_difference']:.2g}", f"{one['iou']:.5f}") for name, one in items.items()]
    return said + "\n".join(lines)


def describe_checks(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The checks of several formats, a row each; `reports` by the format's name."""
    if not all(report.get("verified") for report in reports.values()):
        return describe_check(None)
    clip = next(iter(reports.values()))["clip"]
    lines = ["", "| format | loaded | largest difference of logits | of object scores | overlap of the masks |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, found in reports.items():
        figures = f"{found['max_logit_difference']:.2g}", f"{found['max_score_difference']:.2g}", f"{found['iou']:.5f}"
        lines.append(_row(f"`{name}`", str(found["loaded"]), *figures))
    said = f"Each format was loaded as its users load it, and run on {clip}; compared are the masks of medsam2."
    return "\n".join([said, *lines, "", "Item by item, and with tolerances: README.md and verify.json of each."])


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


# ------------------------------------------------------------------------------------------------ the official format

OFFICIAL_USE = """With Meta's code (`pip install rf-sam-2`), from this folder, for volumes and videos:

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
"""
FIX = "image_predictor._bb_feat_sizes = [({0}, {0}), ({1}, {1}), ({2}, {2})]\n"


def official_card(stem: str, loaded: LoadedModel, check: Mapping[str, Any] | None, scores: Path | None = None) -> str:
    """The text of README.md for the official format."""
    side = loaded.spec.image_size
    fixed = side == 1024
    usage = OFFICIAL_USE.format(
        stem=stem,
        fix_note="" if fixed else " (the last line: the package hard-codes the sizes of 1024 px)",
        fix="" if fixed else FIX.format(side // 4, side // 8, side // 16),
    )
    files = {
        f"{stem}.pt": f"{'bfloat16' if loaded.metadata.get('dtype') == 'bf16' else 'float32'} weights in the official "
        'format, `{"model": state_dict}`',
        f"{stem}.yaml": "the network's configuration; needs no other file",
        "verify.json": "what the check measured",
    }
    return card("sam2", loaded, check, scores, files=files, usage=usage)
