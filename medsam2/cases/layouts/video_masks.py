"""Videos with masks: `videos/CLIP.mp4` and for each clip one of

    masks/CLIP/00000.png    one image per frame (or one folder per object)
    masks/CLIP.avi          a video of grey label values, in a lossless codec (FFV1)
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
from medsam2.cases.layouts.davis_frames import assemble_clip, read_frame_masks
from medsam2.cases.listing import list_visible, read_meta, ref_from_meta

NAME = "video_masks"
LOOKS_FOR = "videos/CLIP.mp4 beside masks/CLIP/*.png, masks/CLIP.avi or a COCO annotations.json"


def recognise(path: Path) -> bool:
    return (path / "videos").is_dir() and any(
        (path / name).exists() for name in ("masks", "annotations", "annotations.json")
    )


def find(path: Path) -> list[CaseRef]:
    meta = read_meta(path)
    videos = [child for child in list_visible(path / "videos") if child.suffix.lower() in VIDEO_ENDINGS]
    return [ref_from_meta(path, clip.stem, clip, (_masks(path, clip.stem),), meta) for clip in videos]


def _masks(path: Path, clip: str) -> Path:
    """Return the path of a clip's masks, or the folder of mask frames if there are none."""
    folder = path / "masks" / clip
    options = [folder, *(path / "masks" / f"{clip}{ending}" for ending in (*VIDEO_ENDINGS, ".json"))]
    options += [path / "annotations" / f"{clip}.json", path / "annotations.json", path / "annotations/annotations.json"]
    return next((option for option in options if option.exists()), folder)


def load(ref: CaseRef) -> Case:
    """Load all frames of the video; mask n belongs to frame n.

    Raises:
        CaseError: the numbers of frames and masks differ.
    """
    where = ref.masks[0]
    image = video.read(ref.images[0], ref.settings)
    count = image.array.shape[0]
    if where.suffix.lower() == ".json":
        return assemble_clip(ref, image, [coco.read_masks(where, ref.case_id, (), image.array.shape[:3])])
    if where.is_file():
        masks = [video.read_mask(where, ref.settings)]
        _check_count(ref, where, masks[0].planes.shape[1], count)
    else:
        masks = read_frame_masks(
            ref, where, partial(_list_mask_frames, ref, count), lambda _, folder, paths: read_mask_frames(paths, folder)
        )
    return assemble_clip(ref, image, masks)


def _list_mask_frames(ref: CaseRef, count: int, folder: Path) -> list[Path]:
    """List the mask frames of a folder in order, one per frame of the video."""
    masks = list_frames(folder)
    _check_count(ref, folder, len(masks), count)
    return masks


def _check_count(ref: CaseRef, where: Path, masks: int, frames: int) -> None:
    if masks != frames:
        raise CaseError(
            f"{where}: {masks} masks for a video of {frames} frames ({ref.images[0]}); "
            "give one mask per frame, empty for a frame without objects."
        )
