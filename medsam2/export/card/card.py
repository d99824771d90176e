"""The README.md of an export: a model card of one form for every format.

What it says comes from the checkpoint (datasets, recipe, prompts), from the check that the export has just passed, and
from an evaluation folder where one is given. What nobody stated is named as not stated, never guessed. Its text is
`card.md.jinja`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medsam2.adaptation.lora import PeftSettings
from medsam2.errors import UserError
from medsam2.evaluation.run.checkpoints import weights_hash
from medsam2.export.formats.exporter import Exporter, file_stem
from medsam2.export.targets import TARGETS
from medsam2.files import file_name
from medsam2.model.build import LoadedModel
from medsam2.model.provenance import Provenance
from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TAGS = ("medical-imaging", "segmentation", "sam2", "medsam2")
OPEN_LICENCE = "apache-2.0"  # of Meta's weights, and of this package
PERMISSIVE = {OPEN_LICENCE, "cc0-1.0", "cc0", "cc-by-4.0", "mit", "bsd-3-clause", "public domain"}
PROMPT_NAMES = {
    "mask": "mask of one frame", "box": "box", "click": "one click", "points": "several points",
    "box_click": "box and click", "recist": "RECIST line", "recist_box": "box around a RECIST line",
    "scribble": "scribble",
}  # fmt: skip
METRICS = {"dsc": "DSC", "nsd": "NSD"}
MAX_ROWS = 40  # of one protocol: more belong into the evaluation's own report


def model_card(
    model: LoadedModel,
    folder: Path,
    exporters: Mapping[str, Exporter],
    reports: Mapping[str, Mapping[str, Any]],
    scores: Path | None = None,
) -> str:
    """The text of README.md.

    Args:
        model: the network that was exported, and what its checkpoint says about itself.
        folder: where the formats lie: a sub-folder for each in a release.
        exporters: of the formats by name, in a release several.
        reports: what stands in the verify.json of each format.
        scores: an evaluation folder of these very weights.

    Raises:
        UserError: the scores are not an evaluation, or one of other weights.
    """
    from huggingface_hub import ModelCard, ModelCardData

    provenance, (first, *others) = model.provenance, exporters.values()
    name = licence(provenance)
    data = ModelCardData(
        license=name,
        library_name=exporters.get("sam2", first).library,
        pipeline_tag="mask-generation",
        tags=[*TAGS, *dict.fromkeys(tag for exporter in exporters.values() for tag in exporter.tags)],
        base_model=_base_model(model),
        license_name="see-the-licences-of-the-datasets" if name == "other" else None,
        license_link="README.md#licence" if name == "other" else None,
    )
    values = {
        "spec": model.spec,
        "stem": file_stem(model),
        "parameters": sum(parameter.numel() for parameter in model.sam.parameters()) / 1e6,
        "source": file_name(model.source),
        "title": "the programs below" if others else first.title,
        "facts": {
            name: exporter.describe(model, folder / name if others else folder) for name, exporter in exporters.items()
        },
        "summaries": {name: target.summary for name, target in TARGETS.items()},
        "reports": reports,
        "provenance": provenance,
        "recipe": _recipe(provenance),
        "prompts": _prompts(provenance),
        "scores": read_scores(model, scores),
        "licence": name,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "cell": cell,
    }
    return str(ModelCard.from_template(data, template_path=str(TEMPLATE), **values)).rstrip() + "\n"


def cell(value: Any) -> str:
    """Text for a cell of a table: one line, in which nothing is HTML or ends the cell."""
    return " ".join(str(value).split()).replace("<", "&lt;").replace("|", "\\|")


def licence(provenance: Provenance) -> str:
    """The hub's name of the licence: that of the checkpoint, Apache-2.0 where all data allow it, else "other"."""
    if provenance.licence:
        return provenance.licence.lower()
    stated = {dataset.get("licence", "").strip().lower() for dataset in provenance.datasets.values()}
    return OPEN_LICENCE if stated and stated <= PERMISSIVE else "other"


def _base_model(model: LoadedModel) -> str | None:
    """The hub's name of Meta's weights, where the training started from them."""
    start, spec = file_name(model.provenance.start or ""), model.spec
    if not spec.size.yaml or start != spec.size.file_name(spec.version):
        return None
    return f"facebook/{start.removesuffix('.pt').replace('_', '-')}"


def _recipe(provenance: Provenance) -> dict[str, str]:
    """How the weights came about, as far as the checkpoint says."""
    optim, adaptation = provenance.recipe_part("optim"), provenance.recipe_part("adaptation")
    peft = adaptation.get("peft")
    trained = ", ".join(map(str, adaptation.get("train") or ()))
    if isinstance(peft, Mapping):
        settings = PeftSettings.model_validate(dict(peft))
        rank = "" if settings.config else f" of rank {settings.r}"
        trained = f"{settings.method_name}{rank} on {', '.join(settings.targets)}, merged here"
    start, share = file_name(provenance.start or ""), provenance.interpolated
    retention = provenance.recipe_part("retention")
    rows = {
        "started from": "" if start == "random" else start,
        "configuration": provenance.recipe.get("file"),
        "optimiser steps": provenance.step,
        "trained": trained,
        "learning rate": optim.get("lr"),
        "weight decay": optim.get("weight_decay"),
        "retention": ", ".join(f"{key} {retention[key]}" for key in ("l2", "distillation") if retention.get(key)),
        "interpolated": None if share is None else f"{share:g} of the way from start to end",
        "weights": provenance.weights,
        "imported from": provenance.imported,
        "seed": provenance.seed,
        "commit": provenance.commit,
    }
    return {name: str(value) for name, value in rows.items() if value not in (None, "")}


def _prompts(provenance: Provenance) -> dict[str, str]:
    """Which prompts it was trained with, and how often; {} where the checkpoint does not say."""
    settings = provenance.trained_prompts
    if settings is None:
        return {}
    untrained = "none: do not rely on it"
    total = sum(settings.kinds.values())
    rows = {
        PROMPT_NAMES.get(kind, kind): f"{100 * weight / total:.0f} %" if weight else untrained
        for kind, weight in settings.kinds.items()
    }
    corrected = settings.corrections * bool(settings.correction_frames) * (settings.correction_probability > 0)
    clicks = f"up to {settings.corrections} on a frame" if corrected else untrained
    return {**rows, "correction clicks, positive and negative": clicks}


# ------------------------------------------------------------------------------- scores of an evaluation


def read_scores(model: LoadedModel, folder: Path | None) -> dict[str, Any] | None:
    """What the card's template shows of an evaluation folder; None where there is none.

    Raises:
        UserError: it is no evaluation folder, or these weights are not among those that it evaluated.
    """
    if folder is None:
        return None
    summary = _read_summary(folder)
    label = _label(summary, weights_hash(model.sam.state_dict().items()), model.source, folder)
    tolerances = summary.get("metrics") or {}
    return {
        "split": summary["split"],
        "source": Path(str(summary["source"])).name,
        "level": 100 * summary["bootstrap"]["level"],
        "nsd_mm": tolerances.get("nsd_mm", 2),
        "nsd_px": tolerances.get("nsd_px", 2),
        "leaks": int(summary.get("leaks", {}).get(label, 0)),
        "protocols": [_protocol(entry, label) for entry in summary["protocols"]],
    }


def _read_summary(folder: Path) -> dict[str, Any]:
    path = Path(folder) / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--scores {folder} is no evaluation folder ({error}); give the output of evaluate.py."
        ) from None
    missing = {"models", "protocols", "bootstrap", "split"} - (summary.keys() if isinstance(summary, dict) else set())
    if missing:
        raise UserError(
            f"--scores {path} lacks {', '.join(sorted(missing))}: it is of another version; evaluate again."
        )
    return dict(summary)


def _label(summary: Mapping[str, Any], weights: str, source: str, folder: Path) -> str:
    """The label of the evaluated checkpoint that has these weights; any other's scores would be of another model."""
    for note in summary["models"]:
        if note["weights"] == weights:
            return str(note["label"])
    others = ", ".join(f"{note['label']} ({note['name']})" for note in summary["models"])
    raise UserError(
        f"--scores {folder}: that evaluation is of other weights than {source}: {others}. Evaluate the checkpoint that "
        "is exported, or leave --scores out."
    )


def _protocol(entry: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Name, settings, remark and rows of one protocol."""
    settings, groups = entry["protocol"], entry["groups"]
    stated = [settings.get("prompt") or "", *(f"{key}: {settings[key]}" for key in ("slices", "direction")
                                              if settings.get(key))]  # fmt: skip
    metrics = [key for key in METRICS if any((group.get(key) or {}).get(label) is not None for group in groups)]
    keys = ("dataset", "modality", "structure", "patients", "objects")
    return {
        "title": f"{settings['name']} ({', '.join(text for text in stated if text)})".removesuffix(" ()"),
        "remark": entry.get("outside", {}).get(label),
        "metrics": [METRICS[key] for key in metrics],
        "rows": [
            [*(group[key] for key in keys), *(_number(group, key, label) for key in metrics)]
            for group in groups[-MAX_ROWS:]
        ],
        "groups": len(groups),
    }


def _number(group: Mapping[str, Any], key: str, label: str) -> str:
    """0.812 (0.790 to 0.833)."""
    mean = (group.get(key) or {}).get(label)
    if mean is None:
        return ""
    interval = (group.get(f"{key}_interval") or {}).get(label)
    return f"{mean:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
