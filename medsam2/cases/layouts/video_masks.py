"""Videos with masks: `videos/CLIP.mp4` and for each clip one of

    masks/CLIP/00000.png    a picture a frame (or a folder for each object)
    masks/CLIP.avi          a video of grey label values, in a codec without loss (FFV1)
    masks/CLIP.json         COCO; also annotations/CLIP.json, or annotations.json for all clips

and optionally `meta.json`.
"""

from __future__ import annotations

from pathlib import Path

from medsam2.cases.case import Case, CaseError
from medsam2.cases.formats import coco, video
from medsam2.cases.formats.frames import list_frames, mask_of
from medsam2.cases.formats.video import VIDEO_ENDINGS
from medsam2.cases.layouts.davis_frames import clip_case, object_mask
from medsam2.cases.layouts.manifest import has_manifest
from medsam2.cases.layouts.meta import described_ref, read_meta
from medsam2.cases.layouts.registry import CaseRef
from medsam2.cases.raster import MaskRaster

NAME = "video_masks"
LOOKS_FOR = "videos/CLIP.mp4 beside masks/CLIP/*.png, masks/CLIP.avi or a COCO annotations.json"


def recognise(path: Path) -> bool:
    if not (path / "videos").is_dir() or has_manifest(path):
        return False
    return any((path / name).exists() for name in ("masks", "annotations", "annotations.json"))


def find(path: Path) -> list[CaseRef]:
    meta = read_meta(path)
    videos = sorted(p for p in (path / "videos").iterdir() if p.suffix.lower() in VIDEO_ENDINGS)
    return [
        described_ref(path, NAME, clip.stem, clip, (_masks(path, clip.stem),), meta)
        for clip in videos
        if not clip.name.startswith(".")
    ]


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
    count, height, width = image.array.shape[:3]
    if where.suffix.lower() == ".json":
        return clip_case(ref, image, [coco.read_masks(where, ref.case_id, (), (count, height, width))])
    if where.is_file():
        masks = [video.read_mask(where, ref.settings)]
        _check_count(ref, where, masks[0].planes.shape[1], count)
    elif list_frames(where):
        masks = [_frames_mask(ref, where, count)]
    else:
        objects = [child for child in sorted(where.iterdir()) if child.is_dir() and not child.name.startswith(".")]
        masks = [object_mask(ref, _frames_mask(ref, child, count), child.name) for child in objects]
    return clip_case(ref, image, masks)


def _frames_mask(ref: CaseRef, folder: Path, count: int) -> MaskRaster:
    masks = list_frames(folder)
    _check_count(ref, folder, len(masks), count)
    return mask_of(masks, folder)


def _check_count(ref: CaseRef, where: Path, found: int, wanted: int) -> None:
    if found != wanted:
        raise CaseError(
            f"{where}: {found} masks for a video of {wanted} frames ({ref.images[0]}); "
            "give one mask a frame, empty where nothing is there."
        )
