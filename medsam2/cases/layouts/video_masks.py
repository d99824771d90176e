"""Videos with mask frames: `videos/CLIP.mp4`, `masks/CLIP/00000.png`, optionally `meta.json`."""

from __future__ import annotations

from pathlib import Path

from medsam2.cases.case import Case, CaseError
from medsam2.cases.formats.frames import list_frames, read_masks
from medsam2.cases.formats.video import VIDEO_ENDINGS, read_video
from medsam2.cases.layouts.davis_frames import clip_case
from medsam2.cases.layouts.meta import clip_ref, read_meta
from medsam2.cases.layouts.registry import CaseRef

NAME = "video_masks"
LOOKS_FOR = "videos/CLIP.mp4 beside masks/CLIP/*.png"


def recognise(path: Path) -> bool:
    return (path / "videos").is_dir() and (path / "masks").is_dir()


def find(path: Path) -> list[CaseRef]:
    meta = read_meta(path)
    videos = sorted(p for p in (path / "videos").iterdir() if p.suffix.lower() in VIDEO_ENDINGS)
    return [
        clip_ref(path, NAME, video.stem, video, path / "masks" / video.stem, meta)
        for video in videos
        if not video.name.startswith(".")
    ]


def load(ref: CaseRef) -> Case:
    """All frames of the video; the n-th mask file belongs to the n-th frame.

    Raises:
        CaseError: the numbers of frames and masks differ.
    """
    masks = list_frames(ref.masks[0])
    image, rate = read_video(ref.images[0])
    if len(masks) != image.shape[0]:
        raise CaseError(
            f"{ref.masks[0]}: {len(masks)} masks for a video of {image.shape[0]} frames ({ref.images[0]}); "
            "give one mask a frame, empty where nothing is there."
        )
    seconds = ref.spacing[0] or (1.0 / rate if rate else 0.0)
    return clip_case(ref, image, read_masks(masks), ref.masks[0], seconds)
