"""COCO annotations (polygons and run-length encodings) of the frames of a clip."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.objects import pack
from medsam2.cases.raster import MaskRaster, check_readable, check_size, explain, read_json

Shape = tuple[int, int, int]
FrameSegments = list[tuple[int, Any]]
"""(frame index, segmentation) of each annotation of one object."""
MAX_COORDINATE = 1e6
"""Limit in pixels, since the run time of the COCO API grows with the length of polygon edges."""


@dataclass(frozen=True)
class _Clip:
    """The clip to find in the json file at `path`; see `read_masks`."""

    path: Path
    name: str
    frames: Sequence[str]
    shape: Shape


def read_masks(path: Path, clip: str, names: Sequence[str], shape: Shape) -> MaskRaster:
    """Read the annotations of one clip as label planes; overlapping objects lie in different planes.

    Each track (`track_id` or `instance_id`, also below `attributes`) is an object; without tracks, each category is.

    Args:
        clip: name of the clip in `videos` or in the folders of the file names. names: names of its frames; empty for a
            video, whose n-th image is its n-th frame. shape: [T, H, W] of the image.

    Raises:
        CaseError: not COCO, a frame is not listed, a file name leaves the folder, or a segmentation does not fit.
    """
    check_readable(path)
    content = read_json(path)
    with explain(path, "not a COCO file", "it needs images or videos, annotations and categories"):
        objects = _objects(_Clip(path, clip, names, shape), content)
        planes, labels = pack(_draw(path, objects, shape), shape, lambda size: check_size(path, size))
        return MaskRaster(planes, path, labels=labels)


def _objects(clip: _Clip, content: Mapping[str, Any]) -> list[tuple[str, FrameSegments]]:
    categories = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
    annotations = content["annotations"]
    video = _find_video(clip, content.get("videos") or [])
    frame_of = _frames_of_images(clip, content["images"], video)
    objects: dict[tuple[int, Any], FrameSegments] = defaultdict(list)
    for entry in annotations:
        frame = frame_of.get(entry["image_id"])
        if frame is not None and entry.get("segmentation"):
            sources = (entry, entry.get("attributes") or {})
            track = next((s[key] for s in sources for key in ("track_id", "instance_id") if key in s), None)
            objects[int(entry["category_id"]), track].append((frame, entry["segmentation"]))
    return [(categories[category], segments) for (category, _), segments in objects.items()]


def _find_video(clip: _Clip, videos: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the entry of `videos` for the clip, or None if the file has no videos.

    Raises:
        CaseError: no video has the name of the clip, or the file has the YouTube-VIS format.
    """
    names = [str(video.get("name") or video.get("file_name") or "") for video in videos]
    for video, name in zip(videos, names, strict=True):
        if "file_names" in video:
            raise CaseError(f"{clip.path}: YouTube-VIS is not read; export COCO with images, or masks as pictures.")
        aliases = {name, PurePosixPath(name).stem, PurePosixPath(str(video.get("file_name"))).stem}
        if clip.name in aliases or names == [""]:
            return video
    if videos:
        listed = ", ".join(names[:5])
        raise CaseError(f"{clip.path}: no video {clip.name!r} in it (it has {listed}); give the clip one of its names.")
    return None


def _frames_of_images(
    clip: _Clip, images: Sequence[Mapping[str, Any]], video: Mapping[str, Any] | None
) -> dict[Any, int]:
    """Map the id of every image of the clip to its frame index."""
    files = [(_relative_path(clip.path, str(entry["file_name"])), entry) for entry in images]
    if video is not None:
        files = [(file, entry) for file, entry in files if entry.get("video_id") == video["id"]]
    elif any(clip.name in file.parts[:-1] for file, _ in files):
        files = [(file, entry) for file, entry in files if clip.name in file.parts[:-1]]
    elif any(len(file.parts) > 1 for file, _ in files) and clip.frames:
        files = [(file, entry) for file, entry in files if len(file.parts) == 1]
    files.sort(key=lambda pair: (_frame_number(pair[1]), pair[0].name))
    frame_of: dict[Any, int] = {}
    for frame, (_, entry) in zip(_frame_indices(clip, [file for file, _ in files]), files, strict=True):
        if frame is not None:
            _check_size(clip, entry)
            frame_of[entry["id"]] = frame
    return frame_of


def _frame_number(image: Mapping[str, Any]) -> int:
    return int(next((image[key] for key in ("frame_id", "frame_index", "frame") if key in image), -1))


def _frame_indices(clip: _Clip, files: Sequence[PurePosixPath]) -> list[int | None]:
    """Return the frame index of every listed file; None if the clip has no such frame."""
    if not clip.frames:
        if len(files) != clip.shape[0]:
            raise CaseError(
                f"{clip.path}: lists {len(files)} frames for a video of {clip.shape[0]}; list every frame once."
            )
        return list(range(len(files)))
    index = {PurePosixPath(name).stem: number for number, name in enumerate(clip.frames)}
    listed = {file.stem for file in files}
    missing = [name for name in index if name not in listed]
    if missing:
        raise CaseError(
            f"{clip.path}: {len(missing)} of {len(clip.frames)} frames are not listed, first {missing[0]}; list "
            "frames without objects too, with no annotations."
        )
    return [index.get(file.stem) for file in files]


def _relative_path(path: Path, name: str) -> PurePosixPath:
    """Return a file name of the json as a path, which must stay below the folder."""
    relative = PurePosixPath(str(name).replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or (relative.parts and ":" in relative.parts[0]):
        raise CaseError(f"{path}: file name {name!r} leaves the folder; use relative names.")
    return relative


def _check_size(clip: _Clip, entry: Mapping[str, Any]) -> None:
    expected = clip.shape[1:]
    size = (int(entry.get("height", expected[0])), int(entry.get("width", expected[1])))
    if size != expected:
        raise CaseError(f"{clip.path}: states height and width {size}, but the frames are {expected}; correct it.")


def _draw(path: Path, objects: Sequence[tuple[str, FrameSegments]], shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and mask bool [T, H, W] of every object."""
    for name, segments in objects:
        mask = np.zeros(shape, np.bool_)
        for frame, segmentation in segments:
            mask[frame] |= decode(path, segmentation, shape[1:])
        yield name, mask


def decode(path: Path, segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Decode a list of polygons or run lengths, plain or compressed, to bool [H, W] through the COCO API.

    Raises:
        CaseError: run lengths or a polygon do not fit the frame.
    """
    from pycocotools import mask as coco

    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon, np.float64) for polygon in segmentation]
        for corners in polygons:
            inside = corners.ndim == 1 and np.abs(corners).max(initial=0) < MAX_COORDINATE  # False for NaN
            if not inside or corners.size < 6 or corners.size % 2:
                raise CaseError(f"{path}: a polygon needs three or more (x, y) pairs, found {str(corners)[:60]}.")
        runs = coco.merge(coco.frPyObjects([corners.tolist() for corners in polygons], *size))
        return np.asarray(coco.decode(runs), np.bool_)
    height, width = (int(number) for number in segmentation["size"])
    if (height, width) != size:
        raise CaseError(f"{path}: run lengths of size {(height, width)} for frames of {size}; they must be equal.")
    counts = segmentation["counts"]
    if not isinstance(counts, str):
        numbers = np.asarray(counts, np.int64)
        valid = numbers.ndim == 1 and numbers.min(initial=0) >= 0 and numbers.max(initial=0) <= height * width
        if not valid or numbers.sum() != height * width:
            raise CaseError(f"{path}: run lengths add up to {numbers.sum()}, not {height} x {width}; export it again.")
        counts = coco.frPyObjects({"size": size, "counts": numbers.tolist()}, *size)["counts"].decode()
    # A character whose bit 32 is set continues a number: such an end would make the decoder read beyond the text.
    if not re.fullmatch(r"[0-o]*[0-O]", counts):
        raise CaseError(f"{path}: run lengths are not text of the COCO API ({counts[:60]!r}); export it again.")
    try:
        mask = coco.decode({"size": size, "counts": counts})
    except ValueError:
        raise CaseError(f"{path}: run lengths add up to more than {height} x {width}; export it again.") from None
    try:
        # A frame with one pixel less is refused as too small only if the run lengths fill the real frame.
        coco.decode({"size": (1, height * width - 1), "counts": counts})
    except ValueError:
        return np.asarray(mask, np.bool_)
    raise CaseError(f"{path}: run lengths add up to less than {height} x {width}; export it again.")
