"""Medical Segmentation Decathlon: `dataset.json` that lists `imagesTr/CASE.nii.gz` with `labelsTr/CASE.nii.gz`."""

from __future__ import annotations

from pathlib import Path

from medsam2.cases.case import CaseRef
from medsam2.cases.layouts import monai_datalist
from medsam2.cases.layouts.nnunet_raw import lists_whole_names
from medsam2.cases.raster import read_json

NAME = "msd"
LOOKS_FOR = "dataset.json that lists training images with labels, beside imagesTr/"


def recognise(path: Path) -> bool:
    if not (path / "dataset.json").is_file() or not (path / "imagesTr").is_dir() or not lists_whole_names(path):
        return False
    description = read_json(path / "dataset.json")
    return "modality" in description or "labels" in description


def find(path: Path) -> list[CaseRef]:
    """List the cases in `dataset.json`; several channels in `modality` are the fourth axis of the files.

    Test images have no labels and are left out.
    """
    return monai_datalist.find(path / "dataset.json")
