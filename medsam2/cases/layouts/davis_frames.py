"""DAVIS and EndoVis frames: `JPEGImages/CLIP/00000.jpg`, `Annotations/CLIP/00000.png`, optionally `meta.json`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medsam2.cases.case import Case, CaseError
from medsam2.cases.formats.frames import list_frames, read_frames, read_masks
from medsam2.cases.layouts.meta import clip_labels, clip_ref, read_meta
from medsam2.cases.layouts.registry import CaseRef

NAME = "davis_frames"
LOOKS_FOR = "JPEGImages/CLIP/*.jpg beside Annotations/CLIP/*.png"
RESOLUTIONS = ("480p", "Full-Resolution", "1080p")


def recognise(path: Path) -> bool:
    return (path / "JPEGImages").is_dir() and (path / "Annotations").is_dir()


def find(path: Path) -> list[CaseRef]:
    meta = read_meta(path)
    images, masks = path / "JPEGImages", path / "Annotations"
    level = next((r for r in RESOLUTIONS if (images / r).is_dir() and (masks / r).is_dir()), None)
    if level:
        images, masks = images / level, masks / level
    clips = sorted(p for p in images.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [clip_ref(path, NAME, clip.name, clip, masks / clip.name, meta) for clip in clips]


def load(ref: CaseRef) -> Case:
    """All frames with their masks, matched by name.

    Raises:
        CaseError: no frames, or a frame without a mask (an unlabelled frame must not pass for an empty one).
    """
    frames, masks = list_frames(ref.images[0]), {p.stem: p for p in list_frames(ref.masks[0])}
    if not frames:
        raise CaseError(f"{ref.images[0]}: holds no frames.")
    missing = [p.name for p in frames if p.stem not in masks]
    if missing:
        raise CaseError(
            f"{ref.masks[0]}: {len(missing)} of {len(frames)} frames have no mask, first {missing[0]}; remove these "
            "frames, or add an empty mask where nothing is there."
        )
    image, mask = read_frames(frames), read_masks([masks[p.stem] for p in frames])
    return clip_case(ref, image, mask, ref.masks[0], ref.spacing[0])


def clip_case(ref: CaseRef, image: np.ndarray, mask: np.ndarray, where: Path, seconds: float) -> Case:
    """The `Case` of a clip: image [T, H, W(, 3)] with mask [T, H, W]; `seconds` between frames, 0 if unknown."""
    if mask.shape != image.shape[:3]:
        raise CaseError(
            f"{where}: masks of shape {mask.shape} (frames, height, width) for an image of shape {image.shape[:3]} "
            f"({ref.images[0]}); they must be equal."
        )
    mask, labels = clip_labels(ref, mask, where)
    pixel = ref.spacing[1] or 1.0
    return ref.case(image, mask[None], labels, (seconds or 1.0, pixel, pixel), moving=True)
