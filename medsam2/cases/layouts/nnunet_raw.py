"""nnU-Net raw (v2): `dataset.json`, `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medsam2.cases.case import Case, CaseError, Label
from medsam2.cases.formats.volume import read_volume
from medsam2.cases.layouts.meta import read_json
from medsam2.cases.layouts.registry import CaseRef
from medsam2.cases.values import present_values

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


def recognise(path: Path) -> bool:
    return (path / "dataset.json").is_file() and (path / "imagesTr").is_dir() and (path / "labelsTr").is_dir()


def find(path: Path) -> list[CaseRef]:
    """One case a label file or first channel; what lacks its other half is found too, and fails when read."""
    description = read_json(path / "dataset.json")
    ending = str(description.get("file_ending", ".nii.gz"))
    channel = first_channel(description)
    labels = tuple(
        (tuple(int(v) for v in value) if isinstance(value, list) else (int(value),), str(name))
        for name, value in description.get("labels", {}).items()
        if name != "ignore" and value != 0
    )
    first = f"_0000{ending}"
    names = {p.name.removesuffix(first) for p in (path / "imagesTr").iterdir() if p.name.endswith(first)}
    names |= {p.name.removesuffix(ending) for p in (path / "labelsTr").iterdir() if p.name.endswith(ending)}
    refs = []
    for name in sorted(n for n in names if not n.startswith(".")):
        image, mask = path / "imagesTr" / f"{name}{first}", path / "labelsTr" / f"{name}{ending}"
        missing = next((p for p in (image, mask) if not p.is_file()), None)
        refs.append(
            CaseRef(
                dataset=path.name,
                case_id=name,
                patient_id=name,
                layout=NAME,
                images=(image,),
                masks=(mask,),
                modality=modality_of(channel),
                labels=labels,
                problem=f"{missing}: no such file, but its counterpart exists." if missing else "",
            )
        )
    return refs


def first_channel(description: dict[str, Any]) -> str:
    """The name of channel 0 (`channel_names`, or `modality` in version 1)."""
    channels = description.get("channel_names") or description.get("modality") or {}
    return str(channels.get("0", channels.get(0, "")))


def modality_of(channel: str) -> str:
    """Our modality for a channel name, or "" where it is not known."""
    words = channel.lower().replace("_", " ").split()
    return next((m for m, known in CHANNELS.items() if any(word in known for word in words)), "")


def load(ref: CaseRef) -> Case:
    """Channel 0 with its mask. Regions (labels given as lists) overlap: each gets a plane of its own."""
    volume = read_volume(ref.images[0], ref.masks)
    mask = volume.masks[0]
    plain = [(values[0], name) for values, name in ref.labels if len(values) == 1]
    regions = [(values, name) for values, name in ref.labels if len(values) > 1]
    known = {value for values, _ in ref.labels for value in values}
    unknown = [value for value in present_values(mask) if value not in known]
    if unknown and known:
        raise CaseError(
            f"{ref.masks[0]}: the mask holds {unknown}, which dataset.json does not name (it names {sorted(known)})."
        )
    if not known:
        plain = [(value, f"label_{value}") for value in unknown]
    planes = [mask] + [np.isin(mask, values).astype(mask.dtype) for values, _ in regions]
    labels = [Label(value, name) for value, name in plain]
    labels += [Label(1, name, plane) for plane, (_, name) in enumerate(regions, start=1)]
    if not plain and regions:
        planes, labels = planes[1:], [Label(1, label.name, label.plane - 1) for label in labels]
    return ref.case(volume.image, np.stack(planes), labels, volume.spacing, affine=volume.affine)
