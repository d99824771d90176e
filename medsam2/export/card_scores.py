"""The scores on a model card: those of an evaluation of these very weights, with their intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medsam2.errors import UserError
from medsam2.evaluation.contestants import weights_hash
from medsam2.model.build import LoadedModel

SHOWN = {"dsc": "DSC", "nsd": "NSD"}
ROWS = 40  # of one protocol: more belong into the evaluation's own report


def scores_section(loaded: LoadedModel, scores: Path | None) -> str:
    """Markdown: a table a protocol, mean over patients with the 95 % interval.

    Args:
        scores: an evaluation folder, or None.

    Raises:
        UserError: it is none, or these weights are not among those that it evaluated.
    """
    if scores is None:
        return "Not stated: the export was given no evaluation (`--scores FOLDER`)."
    summary = read_summary(scores)
    label = find_label(summary, weights_hash(loaded.sam.state_dict().items()), loaded.source, scores)
    metrics, leaks = summary.get("metrics") or {}, int(summary.get("leaks", {}).get(label, 0))
    parts = [
        f"Means over patients of the {summary['split']} cases of `{Path(str(summary['source'])).name}`, with the "
        f"interval of {100 * summary['bootstrap']['level']:.0f} % (bootstrap over patients). NSD forgives "
        f"{metrics.get('nsd_mm', 2):g} mm in volumes and {metrics.get('nsd_px', 2):g} px in clips and stills."
    ]
    if leaks:
        parts.append(f"**{leaks} of these cases were in the training: the scores are too good.**")
    for entry in summary["protocols"]:
        note = entry.get("outside", {}).get(label)
        parts.append(f"### {_protocol(entry['protocol'])}" + (f"\n\n{note}" if note else ""))
        parts.append(_table(entry["groups"], label))
    return "\n\n".join(parts)


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of an evaluation folder.

    Raises:
        UserError: no such file, or not one of ours.
    """
    path = Path(folder) / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--scores {folder} is no evaluation folder ({error}); give the output of evaluate.py."
        ) from None
    lacking = {"models", "protocols", "bootstrap", "split"} - (summary.keys() if isinstance(summary, dict) else set())
    if lacking:
        raise UserError(
            f"--scores {path} lacks {', '.join(sorted(lacking))}: it is of another version; evaluate again."
        )
    found: dict[str, Any] = summary
    return found


def find_label(summary: Mapping[str, Any], weights: str, source: str, folder: Path) -> str:
    """The label of the evaluated checkpoint that has these weights.

    Raises:
        UserError: none has: its scores would be those of another model.
    """
    for note in summary["models"]:
        if note["weights"] == weights:
            return str(note["label"])
    others = ", ".join(f"{note['label']} ({note['name']})" for note in summary["models"])
    raise UserError(
        f"--scores {folder}: that evaluation is of other weights than {source}: {others}. Evaluate the checkpoint that "
        "is exported, or leave --scores out."
    )


def _protocol(settings: Mapping[str, Any]) -> str:
    """largest_box_both (box, slices: largest, direction: both)."""
    said = [f"{settings['prompt']}"] if settings.get("prompt") else []
    said += [f"slices: {settings['slices']}"] if settings.get("slices") else []
    said += [f"direction: {settings['direction']}"] if settings.get("direction") else []
    return str(settings["name"]) + (f" ({', '.join(said)})" if said else "")


def _table(groups: list[Mapping[str, Any]], label: str) -> str:
    shown = {key: name for key, name in SHOWN.items() if any((g.get(key) or {}).get(label) is not None for g in groups)}
    lines = ["| data set | modality | structure | patients | objects | " + " | ".join(shown.values()) + " |"]
    lines.append("| --- " * (5 + len(shown)) + "|")
    for group in groups[-ROWS:]:
        cells = [str(group[key]) for key in ("dataset", "modality", "structure", "patients", "objects")]
        cells += [_number(group, key, label) for key in shown]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if len(groups) > ROWS:
        lines += ["", f"The last {ROWS} of {len(groups)} groups, totals included; the evaluation's report has all."]
    return "\n".join(lines)


def _number(group: Mapping[str, Any], key: str, label: str) -> str:
    """0.812 (0.790 to 0.833)."""
    mean = (group.get(key) or {}).get(label)
    if mean is None:
        return ""
    interval = (group.get(f"{key}_interval") or {}).get(label)
    return f"{mean:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
