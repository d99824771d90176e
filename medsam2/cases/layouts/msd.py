"""Medical Segmentation Decathlon: `dataset.json` that lists `imagesTr/CASE.nii.gz` with `labelsTr/CASE.nii.gz`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medsam2.cases.case import CaseError, Origin
from medsam2.cases.layouts.manifest import has_manifest
from medsam2.cases.layouts.meta import read_json
from medsam2.cases.layouts.nnunet_raw import lists_whole_names, modality_of
from medsam2.cases.layouts.registry import CaseRef
from medsam2.cases.listing import (
    channel_names,
    each_slice,
    label_pairs,
    load_listed,
    settle_channels,
    stem,
    within,
)

NAME = "msd"
LOOKS_FOR = "dataset.json that lists training images with labels, beside imagesTr/"

load = load_listed
"""One channel, or one slice in time, with its mask."""
settle = settle_channels


def recognise(path: Path) -> bool:
    if not (path / "dataset.json").is_file() or not (path / "imagesTr").is_dir() or has_manifest(path):
        return False
    if not lists_whole_names(path):
        return False
    description = read_json(path / "dataset.json")
    return "modality" in description or "labels" in description


def find(path: Path) -> list[CaseRef]:
    """One case an entry of `training` and channel (the fourth axis, where `modality` names several).

    The test images come without labels and are left out.

    Raises:
        CaseError: `dataset.json` cannot be read, or an entry leads out of the folder.
    """
    where = path / "dataset.json"
    description = read_json(where)
    labels = label_pairs(description.get("labels", {}), where)
    channels = channel_names(description) or [""]
    refs: list[CaseRef] = []
    for number, entry in enumerate(description["training"]):
        if not isinstance(entry.get("label"), str):
            raise CaseError(f"{where}: training[{number}] names no label; expected an image and a label.")
        image, mask = within(path, entry["image"], where), within(path, entry["label"], where)
        if image.name.startswith("._"):
            continue  # what macOS leaves beside a file is not one
        missing = next((p for p in (image, mask) if not p.is_file()), None)
        ref = CaseRef(
            dataset=path.absolute().name,
            case_id=stem(image),
            patient_id=stem(image),
            layout=NAME,
            images=(image,),
            masks=(mask,),
            labels=labels,
            origin=Origin.stated(description),
            problem=f"{missing}: no such file, but {where} lists it." if missing else "",
        )
        refs += each_channel(ref, channels)
    return refs


def each_channel(ref: CaseRef, channels: list[str]) -> list[CaseRef]:
    """One reference a named channel of a file, or a slice in time where there is only one channel."""
    if len(channels) < 2:
        return each_slice(replace(ref, modality=modality_of(channels[0]) if channels else ""))
    return [
        replace(
            ref,
            case_id=f"{ref.case_id}_{number:04d}",
            part=f"channel {number} of {len(channels)}",
            modality=modality_of(name),
        )
        for number, name in enumerate(channels)
    ]
