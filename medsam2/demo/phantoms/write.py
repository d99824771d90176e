"""Write generated cases as nnU-Net raw folders of NIfTI, or as frames or MP4 with palette masks."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2

from medsam2.cases.case import GENERATED_SOURCE
from medsam2.cases.outputs.frames import save
from medsam2.cases.outputs.mp4 import encode
from medsam2.cases.outputs.volume import write_mask
from medsam2.demo.phantoms.families import FAMILIES, PHANTOM_MODALITIES, check_families, check_modality, choose
from medsam2.demo.phantoms.generate import FPS, US_PIXEL_MM, dataset_name, generate
from medsam2.errors import UserError
from medsam2.files import atomic_write, new_folder

JPEG_QUALITY = 95
H264_CRF = 14
CHANNEL_NAMES = {"CT": "CT", "MR": "MRI"}
FOLDERS = {
    "CT": ("imagesTr", "labelsTr"),
    "MR": ("imagesTr", "labelsTr"),
    "US": ("JPEGImages", "Annotations"),
    "ENDOSCOPY": ("videos", "masks"),
}
"""Folders of the images and masks of a modality in its dataset layout."""
Job = tuple[str, int]
ORIGIN = {"source": GENERATED_SOURCE, "licence": "Apache-2.0"}


def write_cases(
    out: Path | str,
    cases: int = 8,
    seed: int = 0,
    only: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    modalities: tuple[str, ...] = (),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Write `cases` cases of each modality below `out`, over `workers` processes (default: one per core).

    `only` and `without` are as in `generate`. A modality without any family of `only` is left out, unless `modalities`
    names it. `progress(done, total)` is called after each case.

    Returns:
        For each modality its folder, and the names of its labels in the order of their ids (1, 2, ...).

    Raises:
        UserError: a family or modality is unknown, there is nothing to write, or `out` is not empty.
    """
    if cases < 1:
        raise UserError(f"cases is {cases}; write at least one case of each modality.")
    modalities = _modalities(modalities, only, without)
    labels = {modality: choose(modality, only, without).labels for modality in modalities}
    out = new_folder(out)
    folders = {modality: out / dataset_name(modality, only) for modality in modalities}
    jobs = [(modality, index) for modality in modalities for index in range(1, cases + 1)]
    for modality in modalities:
        for name in FOLDERS[modality]:
            (folders[modality] / name).mkdir(parents=True)
    write = partial(write_case, folders, seed, only, without)
    for done, _ in enumerate(_run(write, jobs, workers or os.cpu_count() or 1), start=1):
        if progress:
            progress(done, len(jobs))
    for modality in modalities:
        _describe(folders[modality], modality, cases, labels[modality])
    return {modality: (folders[modality], labels[modality]) for modality in modalities}


def _modalities(names: tuple[str, ...], only: tuple[str, ...], without: tuple[str, ...]) -> tuple[str, ...]:
    if names:
        return tuple(dict.fromkeys(check_modality(name) for name in names))
    excluded = check_families(without, "--without")
    families = [FAMILIES[name] for name in check_families(only or tuple(FAMILIES), "--only") if name not in excluded]
    modalities = tuple(name for name in PHANTOM_MODALITIES if any(name in family.modalities for family in families))
    return modalities or PHANTOM_MODALITIES[-1:]  # `choose` then raises the error


def _run(write: Callable[[Job], None], jobs: list[Job], workers: int) -> Iterator[None]:
    """Run all jobs in worker processes, or in this process if there is one worker."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(write, jobs)
        return
    context = multiprocessing.get_context("spawn")  # OpenCV's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.map(write, jobs, chunksize=max(1, min(8, len(jobs) // (4 * workers))))


def write_case(folders: dict[str, Path], seed: int, only: tuple[str, ...], without: tuple[str, ...], job: Job) -> None:
    """Generate one case and write it in the format of its modality; `job` is (modality, index)."""
    from PIL import Image

    modality, index = job
    case = generate(modality, seed, index, only, without)
    images, masks = (folders[modality] / name for name in FOLDERS[modality])
    if modality in CHANNEL_NAMES:
        volumes = {images / f"{case.case_id}_0000.nii.gz": case.image, masks / f"{case.case_id}.nii.gz": case.planes[0]}
        for path, array in volumes.items():
            write_mask(path, array, case.orientation, case.affine, case.spacing)
        return
    if modality == "US":
        (images / case.case_id).mkdir()
        for frame, picture in enumerate(case.image):
            Image.fromarray(picture).save(images / case.case_id / f"{frame:05d}.jpg", quality=JPEG_QUALITY)
    else:
        encode(images / f"{case.case_id}.mp4", case.image, FPS, H264_CRF, threads=1)
    (masks / case.case_id).mkdir()
    for frame, mask in enumerate(case.planes[0]):
        save(masks / case.case_id / f"{frame:05d}.png", mask, compress_level=1)


def _describe(folder: Path, modality: str, cases: int, labels: tuple[str, ...]) -> None:
    """Write dataset.json (volumes) or meta.json (clips) last, so that a folder without it is known as incomplete."""
    ids = {name: value for value, name in enumerate(labels, start=1)}
    name, content = "meta.json", {"modality": modality, "labels": ids, "fps": FPS, "spacing_mm": None}
    if modality == "US":
        content["spacing_mm"] = US_PIXEL_MM
    elif modality in CHANNEL_NAMES:
        channels, label_ids = {"0": CHANNEL_NAMES[modality]}, {"background": 0, **ids}
        content = {"channel_names": channels, "labels": label_ids, "numTraining": cases, "file_ending": ".nii.gz"}
        name = "dataset.json"
    with atomic_write(folder / name, "w") as file:
        json.dump({**content, **ORIGIN}, file, indent=2)
