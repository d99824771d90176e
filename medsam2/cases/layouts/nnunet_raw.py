"""nnU-Net raw (v1, v2): `dataset.json`, `imagesTr/CASE_0000.nii.gz` (one file a channel), `labelsTr/CASE.nii.gz`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from medsam2.cases.case import CaseError, Origin
from medsam2.cases.layouts.manifest import has_manifest
from medsam2.cases.layouts.meta import read_json
from medsam2.cases.layouts.registry import CaseRef
from medsam2.cases.listing import channel_names, each_slice, label_pairs, load_listed, settle_channels

NAME = "nnunet_raw"
LOOKS_FOR = "dataset.json beside imagesTr/ and labelsTr/"

# what nnU-Net data sets call their first channel; anything else needs --modality, never a silent guess
CHANNELS = {
    "CT": ("ct", "cbct", "hu"),
    "MR": ("mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "flair", "adc", "dwi", "pd", "cine"),
    "PT": ("pt", "pet", "suv"),
    "US": ("us", "ultrasound", "echo"),
    "XRAY": ("xray", "x-ray", "cr", "dx"),
    "ENDOSCOPY": ("endoscopy", "colonoscopy"),
    "MICROSCOPY": ("microscopy", "fluorescence", "em"),
}
# pictures hold the three colours in one file, although dataset.json names three channels
PICTURES = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff")

load = load_listed
"""The image with its mask. Regions (labels given as lists) overlap: each gets a plane of its own."""
settle = settle_channels


def recognise(path: Path) -> bool:
    return (
        (path / "dataset.json").is_file()
        and (path / "imagesTr").is_dir()
        and (path / "labelsTr").is_dir()
        and not has_manifest(path)
        and not lists_whole_names(path)
    )


def lists_whole_names(path: Path) -> bool:
    """Whether `dataset.json` lists images as they lie there, as the Medical Segmentation Decathlon does.

    nnU-Net's version 1 lists `imagesTr/CASE.nii.gz` too, but the file is `imagesTr/CASE_0000.nii.gz`.
    """
    try:
        description = read_json(path / "dataset.json")
    except CaseError:
        return False
    entries = description.get("training") if isinstance(description, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        return False
    images = [entry.get("image") for entry in entries]
    if not all(isinstance(image, str) for image in images):
        return False
    # by file names alone: what the list names is not opened here
    present = {p.name for p in (path / "imagesTr").iterdir()} if (path / "imagesTr").is_dir() else set()
    named = {Path(image).name for image in images}
    return bool(named & present) or not any(re.search(r"_\d{4}\.", name) for name in present)


def find(path: Path) -> list[CaseRef]:
    """One case a label file or image, and channel; what lacks its other half is found too, and fails when read.

    Raises:
        CaseError: `dataset.json` cannot be read.
    """
    description = read_json(path / "dataset.json")
    if not isinstance(description, dict):
        raise CaseError(f"{path / 'dataset.json'}: expected an object with labels and channel_names; mend it.")
    refs = _find(path, "imagesTr", "labelsTr", description, "")
    if (path / "imagesTs").is_dir() and (path / "labelsTs").is_dir():
        refs += _find(path, "imagesTs", "labelsTs", description, "test")
    return refs


def _find(path: Path, images: str, masks: str, description: dict[str, Any], split: str) -> list[CaseRef]:
    ending = str(description.get("file_ending", ".nii.gz"))
    labels = label_pairs(description.get("labels", {}), path / "dataset.json")
    channel = re.compile(rf"(?P<name>.+)_(?P<channel>\d{{4}}){re.escape(ending)}")
    found = [m for p in (path / images).iterdir() if not p.name.startswith(".") and (m := channel.fullmatch(p.name))]
    names = {m["name"] for m in found}
    names |= {
        p.name.removesuffix(ending)
        for p in (path / masks).iterdir()
        if p.name.endswith(ending) and not p.name.startswith(".")
    }
    channels = channel_names(description) or [""]
    in_one_file = ending.lower() in PICTURES and all(int(m["channel"]) == 0 for m in found)
    several = len(channels) > 1 and not in_one_file
    refs = []
    for name in sorted(names):
        mask = path / masks / f"{name}{ending}"
        for number, title in enumerate(channels if several else channels[:1]):
            image = path / images / f"{name}_{number:04d}{ending}"
            missing = next((p for p in (image, mask) if not p.is_file()), None)
            ref = CaseRef(
                dataset=path.absolute().name,
                case_id=f"{name}_{number:04d}" if several else name,
                patient_id=name,
                layout=NAME,
                images=(image,),
                masks=(mask,),
                modality=modality_of(title),
                labels=labels,
                part=f"channel {number}" if several else "",
                split=split,
                origin=Origin.stated(description),
                problem=f"{missing}: no such file, but its counterpart exists." if missing else "",
            )
            refs += each_slice(ref)
    return refs


def modality_of(channel: str) -> str:
    """Our modality for a channel name, or "" where it is not known."""
    words = channel.lower().replace("_", " ").split()
    return next((m for m, known in CHANNELS.items() if any(word in known for word in words)), "")
