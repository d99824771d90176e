"""nnU-Net raw (v1, v2): `dataset.json`, `imagesTr/CASE_0000.nii.gz` (one file per channel), `labelsTr/CASE.nii.gz`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from medsam2.cases.case import CaseError, CaseRef, Origin
from medsam2.cases.listing import channel_names, label_pairs, list_visible, missing_file, split_channels
from medsam2.cases.raster import read_json

NAME = "nnunet_raw"
LOOKS_FOR = "dataset.json beside imagesTr/ and labelsTr/"

# image files hold the three colours together, although dataset.json lists three channels
PICTURE_ENDINGS = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff")


def recognise(path: Path) -> bool:
    return (
        (path / "dataset.json").is_file()
        and (path / "imagesTr").is_dir()
        and (path / "labelsTr").is_dir()
        and not lists_whole_names(path)
    )


def lists_whole_names(path: Path) -> bool:
    """Whether `dataset.json` lists the names of existing images, as the Medical Segmentation Decathlon does.

    Version 1 of nnU-Net also lists `imagesTr/CASE.nii.gz`, but the file is `imagesTr/CASE_0000.nii.gz`.
    """
    try:
        description = read_json(path / "dataset.json")
    except CaseError:
        return False
    entries = description.get("training") if isinstance(description, dict) else None
    images = [e.get("image") if isinstance(e, dict) else None for e in entries] if isinstance(entries, list) else []
    if not images or not all(isinstance(image, str) for image in images):
        return False
    # compares file names only, so that a list cannot make us open other files
    present = {p.name for p in (path / "imagesTr").iterdir()} if (path / "imagesTr").is_dir() else set()
    listed = {Path(str(image)).name for image in images}
    return bool(listed & present) or not any(re.search(r"_\d{4}\.", name) for name in present)


def find(path: Path) -> list[CaseRef]:
    """List one case per image or label file and channel. Incomplete cases are listed, and fail when read.

    Raises:
        CaseError: `dataset.json` cannot be read.
    """
    description = read_json(path / "dataset.json")
    if not isinstance(description, dict):
        raise CaseError(f"{path / 'dataset.json'}: expected an object with labels and channel_names.")
    refs = _find(path, "imagesTr", "labelsTr", description, "")
    if (path / "imagesTs").is_dir() and (path / "labelsTs").is_dir():
        refs += _find(path, "imagesTs", "labelsTs", description, "test")
    return refs


def _find(path: Path, images: str, masks: str, description: dict[str, Any], split: str) -> list[CaseRef]:
    ending = str(description.get("file_ending", ".nii.gz"))
    labels = label_pairs(description.get("labels", {}), path / "dataset.json")
    channel = re.compile(rf"(?P<name>.+)_(?P<channel>\d{{4}}){re.escape(ending)}")
    matches = [match for file in list_visible(path / images) if (match := channel.fullmatch(file.name))]
    names = {match["name"] for match in matches}
    names |= {file.name.removesuffix(ending) for file in list_visible(path / masks) if file.name.endswith(ending)}
    channels = channel_names(description) or [""]
    if ending.lower() in PICTURE_ENDINGS and all(int(match["channel"]) == 0 for match in matches):
        channels = channels[:1]
    refs = []
    for name in sorted(names):
        ref = CaseRef(
            path.absolute().name,
            name,
            name,
            images=tuple(path / images / f"{name}_{number:04d}{ending}" for number in range(len(channels))),
            masks=(path / masks / f"{name}{ending}",),
            labels=labels,
            split=split,
            origin=Origin.from_description(description),
        )
        for part in split_channels(ref, channels):
            refs.append(replace(part, problem=missing_file(part.files, "its counterpart exists", Path.is_file)))
    return refs
