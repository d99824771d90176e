"""The scores on a model card: those of an evaluation of these very weights, with their intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medsam2.errors import UserError
from medsam2.evaluation.contestants import weights_hash
from medsam2.model.build import LoadedModel

METRICS = {"dsc": "DSC", "nsd": "NSD"}
MAX_ROWS = 40  # of one protocol: more belong into the evaluation's own report


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
