"""MONAI's data list: a json with lists `training`, `validation`, `test` of `{"image": ..., "label": ..., "fold": 0}`.

Folds follow MONAI's default: without a validation list, fold 0 is for validation.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from medsam2.cases.case import CaseError, CaseRef, Origin
from medsam2.cases.listing import (
    SPLITS,
    case_names,
    channel_names,
    label_pairs,
    list_visible,
    missing_file,
    resolve_inside,
    split_channels,
    stem,
)
from medsam2.cases.raster import read_json
from medsam2.errors import UserError

NAME = "monai_datalist"
LOOKS_FOR = 'a json with "training": [{"image": ..., "label": ...}]'
KEYS = ("training", "train", "validation", "val", "test", "testing")
MAX_JSON_BYTES = 32 << 20
"""Larger json files are not opened; annotations of other kinds may be far larger."""

YIELDS_TO = ("msd", "nnunet_raw")
"""Their `dataset.json` has the same keys."""


def recognise(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".json" and _is_list(path)
    return path.is_dir() and bool(_lists(path))


def find(path: Path) -> list[CaseRef]:
    """List one case per channel of every entry with a label.

    Raises:
        UserError: the folder holds several lists, or a path leads out of the folder of its list.
    """
    lists = [path] if path.is_file() else _lists(path)
    if len(lists) > 1:
        listing = ", ".join(p.name for p in lists)
        raise UserError(f"{path}: holds {len(lists)} data lists ({listing}); name one of them as SOURCE.")
    where = lists[0]
    description = read_json(where)
    labels = description.get("labels")
    pairs = label_pairs(labels, where) if isinstance(labels, dict) else ()
    channels = channel_names(description)
    entries = [
        (f"{key}[{n}]", entry, split)
        for key in KEYS
        for n, entry in enumerate(description.get(key) or [])
        if (split := _split(key, entry, description)) is not None
    ]
    files = [_files(entry, where, place) for place, entry, _ in entries]
    names = _names([images for images, _ in files])
    refs: list[CaseRef] = []
    for (place, _, split), (images, masks), name in zip(entries, files, names, strict=True):
        if images[0].name.startswith("._"):
            continue  # a metadata file of macOS
        problem = missing_file((*images, *masks), f"{where} lists it ({place})")
        if not masks:
            problem = f"{where}: {place} ({images[0].name}) has no label; add one or remove the entry."
        ref = CaseRef(
            where.absolute().parent.name,
            name,
            name,
            images=images,
            masks=masks,
            labels=pairs,
            split=split,
            origin=Origin.from_description(description),
            problem=problem,
        )
        refs += split_channels(ref, channels)
    return refs


def _split(key: str, entry: Any, description: dict[str, Any]) -> str | None:
    """Return the split of an entry, "" if the list sets none, or None for an entry without ground truth."""
    split = SPLITS[key]
    if split == "test":
        return "test" if isinstance(entry, dict) and entry.get("label") else None
    if split == "val" or description.get("validation") or description.get("val"):
        return split
    if isinstance(entry, dict) and "fold" in entry:
        return "val" if entry["fold"] == 0 else "train"
    return ""


def _files(entry: Any, where: Path, place: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the images and labels of an entry.

    Raises:
        CaseError: a value is not a path, or a path leads out of the folder of the list.
    """
    if not isinstance(entry, dict) or not entry.get("image"):
        raise CaseError(f'{where}: {place} is {str(entry)[:80]!r}; expected {{"image": path, "label": path}}.')
    files = []
    for key in ("image", "label"):
        value = entry.get(key) or []
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise CaseError(f"{where}: {place}: {key} is {str(value)[:80]!r}; expected a path or a list of paths.")
        files.append(tuple(resolve_inside(where.parent, text, where) for text in texts))
    return files[0], files[1]


def _names(images: list[tuple[Path, ...]]) -> list[str]:
    """Name each case after its image, or after the common prefix of its channels."""
    names = case_names([paths[0] for paths in images])
    for index, paths in enumerate(images):
        if len(paths) > 1:
            common = os.path.commonprefix([stem(path) for path in paths]).rstrip("_-. ")
            # the common prefix of CASE_0000 and CASE_0001 ends in zeros of the channel index
            names[index] = common.removesuffix("_000") or paths[0].absolute().parent.name
    return names


def _lists(folder: Path) -> list[Path]:
    return [path for path in list_visible(folder) if path.suffix == ".json" and path.is_file() and _is_list(path)]


def _is_list(path: Path) -> bool:
    """Whether a json file is a data list; unreadable files are not."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return False
        content = path.read_bytes()
        if not any(f'"{key}"'.encode() in content for key in KEYS):
            return False
        description = read_json(path)
    except (OSError, CaseError):
        return False
    if not isinstance(description, dict):
        return False
    entries = [e for key in KEYS if isinstance(description.get(key), list) for e in description[key]]
    dicts = [e for e in entries if isinstance(e, dict)]
    return (
        bool(dicts) and all("image" in e for e in dicts) and any(isinstance(e.get("label"), str | list) for e in dicts)
    )
