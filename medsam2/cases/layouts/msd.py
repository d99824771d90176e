"""Medical Segmentation Decathlon: `dataset.json` that lists `imagesTr/CASE.nii.gz` with `labelsTr/CASE.nii.gz`."""

from __future__ import annotations

from pathlib import Path

from medsam2.cases.case import CaseError, CaseRef, Origin
from medsam2.cases.layouts.nnunet_raw import lists_whole_names
from medsam2.cases.listing import channel_names, each_channel, label_pairs, load_listed, missing_file, stem, within
from medsam2.cases.raster import read_json

NAME = "msd"
LOOKS_FOR = "dataset.json that lists training images with labels, beside imagesTr/"

load = load_listed
"""One channel, or one slice in time, with its mask."""


def recognise(path: Path) -> bool:
    if not (path / "dataset.json").is_file() or not (path / "imagesTr").is_dir() or not lists_whole_names(path):
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
    channels = channel_names(description)
    refs: list[CaseRef] = []
    for number, entry in enumerate(description["training"]):
        if not isinstance(entry.get("label"), str):
            raise CaseError(f"{where}: training[{number}] names no label; expected an image and a label.")
        image, mask = within(path, entry["image"], where), within(path, entry["label"], where)
        if image.name.startswith("._"):
            continue  # what macOS leaves beside a file is not one
        ref = CaseRef(
            path.absolute().name,
            stem(image),
            stem(image),
            images=(image,),
            masks=(mask,),
            labels=labels,
            origin=Origin.stated(description),
            problem=missing_file((image, mask), f"{where} lists it"),
        )
        refs += each_channel(ref, channels)
    return refs
