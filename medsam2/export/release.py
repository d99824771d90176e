"""What a release has beside its formats: one card for all of them, the licence and checksums."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medsam2.errors import UserError
from medsam2.export.card.card import licence, model_card
from medsam2.export.formats.exporter import Exporter
from medsam2.files import file_sha256, write_text
from medsam2.model.build import LoadedModel

CHECKSUMS, LICENCE = "SHA256SUMS", "LICENSE"
OTHER_LICENCE = """The network and Meta's weights, from which this model comes, are under the Apache License 2.0, below.

These weights were also trained on data sets whose licences, or the lack of one, are stated in README.md under "Training
data". They decide who may use the weights for what; whoever passes them on has to settle that, and replace this note.

"""


def write_release(
    folder: Path,
    model: LoadedModel,
    exporters: Mapping[str, Exporter],
    reports: Mapping[str, Mapping[str, Any]],
    scores: Path | None,
) -> None:
    """Write README.md, LICENSE and SHA256SUMS of a folder that has a sub-folder for each format.

    Args:
        reports: what stands in the verify.json of each format.
    """
    write_text(folder / "README.md", model_card(model, folder, exporters, reports, scores))
    write_text(folder / LICENCE, licence_text(model))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    write_text(folder / CHECKSUMS, "".join(lines))


def licence_text(model: LoadedModel) -> str:
    """The Apache License, behind a note where the training data do not allow it by themselves."""
    text = importlib.metadata.distribution("medsam2").read_text("licenses/LICENSE")
    if text is None:
        raise UserError("the licence file of medsam2 is missing from this installation; reinstall it.")
    return text if licence(model.provenance) == "apache-2.0" else OTHER_LICENCE + text
