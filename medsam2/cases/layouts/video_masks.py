"""Videos with masks: `videos/CLIP.mp4` and for each clip one of

    masks/CLIP/00000.png    a picture a frame (or a folder for each object)
    masks/CLIP.avi          a video of grey label values, in a codec without loss (FFV1)
    masks/CLIP.json         COCO; also annotations/CLIP.json, or annotations.json for all clips

and optionally `meta.json`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medsam2.cases.case import Case, CaseError, CaseRef
from medsam2.cases.formats import coco, video
from medsam2.cases.formats.frames import list_frames, read_mask_frames
from medsam2.cases.formats.video import VIDEO_ENDINGS
from medsam2.cases.layouts.davis_frames import clip_case, masks_of_frames
from medsam2.cases.listing import described_ref, read_meta, visible

NAME = "video_masks"
LOOKS_FOR = "videos/CLIP.mp4 beside masks/CLIP/*.png, masks/CLIP.avi or a COCO annotations.json"


def recognise(path: Path) -> bool:
    return (path / "videos").is_dir() and any(
        (path / name).exists() for name in ("masks", "annotations", "annotations.json")
    )


def find(path: Path) -> list[CaseRef]:
    meta = read_meta(path)
    videos = [child for child in visible(path / "videos") if child.suffix.lower() in VIDEO_ENDINGS]
    return [described_ref(path, clip.stem, clip, (_masks(path, clip.stem),), meta) for clip in videos]


def _masks(path: Path, clip: str) -> Path:
    """Where the masks of a clip lie; the folder of frames where there are none."""
    folder = path / "masks" / clip
    options = [folder, *(path / "masks" / f"{clip}{ending}" for ending in (*VIDEO_ENDINGS, ".json"))]
    options += [path / "annotations" / f"{clip}.json", path / "annotations.json", path / "annotations/annotations.json"]
    return next((option for option in options if option.exists()), folder)


def load(ref: CaseRef) -> Case:
    """All frames of the video; the n-th mask belongs to the n-th frame.

    Raises:
        CaseError: the numbers of frames and masks differ.
    """
    where = ref.masks[0]
    image = video.read(ref.images[0], ref.settings)
    count = image.array.shape[0]
    if where.suffix.lower() == ".json":
        return clip_case(ref, image, [coco.read_masks(where, ref.case_id, (), image.array.shape[:3])])
    if where.is_file():
        masks = [video.read_mask(where, ref.settings)]
        _check_count(ref, where, masks[0].planes.shape[1], count)
    else:
        masks = masks_of_frames(
            ref, where, partial(_counted, ref, count), lambda _, folder, paths: read_mask_frames(paths, folder)
        )
    return clip_case(ref, image, masks)


def _counted(ref: CaseRef, count: int, folder: Path) -> list[Path]:
    """The mask frames of a folder, in order, one for every frame of the video."""
    masks = list_frames(folder)
    _check_count(ref, folder, len(masks), count)
    return masks


def _check_count(ref: CaseRef, where: Path, masks: int, frames: int) -> None:
    if masks != frames:
        raise CaseError(
            f"{where}: {masks} masks for a video of {frames} frames ({ref.images[0]}); "
            "give one mask a frame, empty where nothing is there."
        )
