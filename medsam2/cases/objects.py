"""Turn the labels of a source into objects: rename, merge, filter, split into instances, pack.

All functions work plane by plane and slice by slice, to avoid one full-size mask per structure.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medsam2.cases.case import Case, CaseError, Label
from medsam2.cases.settings import LabelRules
from medsam2.cases.values import MAX_LABEL, value_counts


@dataclass(frozen=True)
class _Object:
    """An object, as the ascending (plane, id) pairs of the source that belong to it."""

    name: str
    parts: tuple[tuple[int, int], ...]

    @property
    def planes(self) -> set[int]:
        return {plane for plane, _ in self.parts}

    def values(self, plane: int) -> tuple[int, ...]:
        return tuple(value for part_plane, value in self.parts if part_plane == plane)


def apply_labels(case: Case, rules: LabelRules, min_voxels: int) -> Case:
    """Apply `rules` to the labels of a case, and drop objects of fewer than `min_voxels` voxels.

    Labels of different names that are renamed to one name become one object, and so do the labels of a `merge`; an
    object from several planes gets an additional plane. Labels that share a name in the source remain separate
    instances. Values are renumbered from 1 in every plane, in the order of the source's ids; instances follow, ordered
    by their first voxel. Without rules, the same case is returned.

    Raises:
        CaseError: `keep` leaves no label, or a plane needs more than 65535 values.
    """
    if rules == LabelRules() and min_voxels <= 1:
        return case
    objects = _objects(case.labels, rules)
    lines = tuple(
        replace(line, label=name) for line in case.lines if _is_selected(name := _new_name(line.label, rules)[0], rules)
    )
    if rules.keep and not objects and not lines and (case.labels or case.lines):
        raise CaseError(_no_labels_message(case, rules))
    sources = [
        (plane, [(o.name, o.values(index)) for o in objects if o.planes == {index}])
        for index, plane in enumerate(case.planes)
    ]
    multi_plane = [o for o in objects if len(o.planes) > 1]
    if multi_plane:
        packed, packed_labels = pack((o.name, _union(case.planes, o)) for o in multi_plane)
        sources += [
            (plane, [(label.name, (label.id,)) for label in packed_labels if label.plane == index])
            for index, plane in enumerate(packed)
        ]
    planes: list[np.ndarray] = []
    labels: list[Label] = []
    for plane, objects_of_plane in sources:
        renumbered, names = _renumber(plane, objects_of_plane, rules.instances, min_voxels, case.where)
        if names:
            labels += [Label(value, name, len(planes)) for value, name in enumerate(names, start=1)]
            planes.append(renumbered)
    return replace(case, planes=_stack(planes, case.planes.shape[1:]), labels=tuple(labels), lines=lines)


def _no_labels_message(case: Case, rules: LabelRules) -> str:
    names = [label.name for label in case.labels] + [line.label for line in case.lines]
    available = sorted({_new_name(name, rules)[0] for name in names})
    dropped = f" and drop {', '.join(rules.drop)}" if rules.drop else ""
    return (
        f"{case.where}: labels: keep {', '.join(rules.keep)}{dropped} removes all of {', '.join(available)}. "
        "Keep at least one of these names (after renaming and merging), or exclude the case."
    )


def _matches(name: str, pattern: str) -> bool:
    """Whether name and pattern are equal or match; equality counts because names may hold brackets."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _new_name(name: str, rules: LabelRules) -> tuple[str, bool]:
    """Return the name after `rename` and `merge`, and whether a merge set it."""
    if name in rules.rename:
        name = rules.rename[name]
    else:
        name = next((new for old, new in rules.rename.items() if fnmatch.fnmatchcase(name, old)), name)
    for new, patterns in rules.merge.items():
        if any(_matches(name, pattern) for pattern in patterns):
            return new, True
    # a label that already has the name of a merge belongs to the merged structure
    return name, name in rules.merge


def _is_selected(name: str, rules: LabelRules) -> bool:
    if rules.keep and not any(_matches(name, pattern) for pattern in rules.keep):
        return False
    return not any(_matches(name, pattern) for pattern in rules.drop)


def _objects(labels: Sequence[Label], rules: LabelRules) -> list[_Object]:
    """Group the labels into objects, in the order of their first (plane, id)."""
    groups: dict[str, list[tuple[int, int]]] = {}
    sources: dict[str, set[str]] = {}
    merged: set[str] = set()
    for part, old in sorted({(label.plane, label.id): label.name for label in labels}.items()):
        name, in_merge = _new_name(old, rules)
        if not _is_selected(name, rules):
            continue
        groups.setdefault(name, []).append(part)
        sources.setdefault(name, set()).add(old)
        if in_merge:
            merged.add(name)
    objects = []
    for name, parts in groups.items():
        if name in merged or len(sources[name]) > 1:
            objects.append(_Object(name, tuple(parts)))
        else:  # values that share a name in the source are instances
            objects += [_Object(name, (part,)) for part in parts]
    return sorted(objects, key=lambda o: o.parts)


def _renumber(
    plane: np.ndarray,
    objects: Sequence[tuple[str, tuple[int, ...]]],
    instances: Sequence[str],
    min_voxels: int,
    where: str,
) -> tuple[np.ndarray, list[str]]:
    """Return a plane [T, H, W] with the objects as values 1, 2 ..., and the name of each value.

    Args:
        objects: (name, values in `plane`). instances: names of structures to split into 26-connected components, whose
            values follow those of the other objects.
    """
    from scipy.ndimage import label

    if min_voxels > 1:
        sizes = value_counts(plane)
        objects = [o for o in objects if sum(int(sizes[v]) for v in o[1] if v < sizes.size) >= min_voxels]
    split = [o for o in objects if any(_matches(o[0], pattern) for pattern in instances)]
    whole = [o for o in objects if o not in split]
    names = [name for name, _ in whole]
    _check_count(len(names), where)
    table = np.zeros(max((v for _, values in whole for v in values), default=0) + 2, np.uint16)
    for new, (_, values) in enumerate(whole, start=1):
        table[list(values)] = new
    out = _apply_table(plane, table)
    for name, values in split:
        mask = _mask_of_values(plane, values)
        box = _box(mask)
        if box is None:
            continue
        parts, number = label(mask[box], np.ones((3, 3, 3)))
        part_of_voxel = parts[mask[box]]
        _, first, sizes = np.unique(part_of_voxel, return_index=True, return_counts=True)
        order = [int(part) + 1 for part in np.argsort(first) if sizes[part] >= min_voxels]
        _check_count(len(names) + len(order), where)
        new_values = np.zeros(number + 1, np.uint16)
        new_values[order] = np.arange(len(names) + 1, len(names) + len(order) + 1)
        out[box][mask[box]] = new_values[part_of_voxel]
        names += [name] * len(order)
    return (out.astype(np.uint8) if len(names) < 256 else out), names


def _check_count(number: int, where: str) -> None:
    if number > MAX_LABEL:
        raise CaseError(
            f"{where}: {number} objects in one label plane, at most {MAX_LABEL} fit. Raise min_voxels, or take "
            "names out of labels.instances."
        )


def _apply_table(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return table[value] for every voxel; values outside the table use its first or last entry."""
    out = np.empty(plane.shape, table.dtype)
    for source, target in zip(plane, out, strict=True):
        np.take(table, source.astype(np.intp), out=target, mode="clip")
    return out


def _mask_of_values(plane: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Return a bool mask [T, H, W] of the voxels with one of these values."""
    table = np.zeros(max(values) + 2, np.bool_)
    table[list(values)] = True
    return _apply_table(plane, table)


def _union(planes: np.ndarray, item: _Object) -> np.ndarray:
    """Return a bool mask [T, H, W] of an object with parts in several planes."""
    union = np.zeros(planes.shape[1:], np.bool_)
    for index in item.planes:
        union |= _mask_of_values(planes[index], item.values(index))
    return union


def _stack(planes: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Stack planes to [P, T, H, W], with an empty plane of `shape` if there are none; a single plane is not copied."""
    if not planes:
        return np.zeros((1, *shape), np.uint8)
    return planes[0][None] if len(planes) == 1 else np.stack(planes)


def pack(
    masks: Iterable[tuple[str, np.ndarray]],
    shape: tuple[int, ...] | None = None,
    check_bytes: Callable[[int], None] = lambda size: None,
) -> tuple[np.ndarray, tuple[Label, ...]]:
    """Pack masks that may overlap into label planes; each mask enters the first plane in which its voxels are free.

    Args:
        masks: (name, [T, H, W]) of equal shape, nonzero inside. Pass a generator to keep only one mask in memory.
            Empty masks get no label.
        shape: [T, H, W], needed only if there may be no mask. check_bytes: raises if the planes need too many bytes.

    Returns:
        planes: [P, T, H, W] uint8, or uint16 where a plane holds more than 255 masks; P is at least 1.
        labels: in the order of the masks.

    Raises:
        CaseError: there is neither a mask nor a shape, shapes differ, or a plane needs more than 65535 values.
    """
    planes: list[np.ndarray] = []
    num_values: list[int] = []
    labels: list[Label] = []
    for name, mask in masks:
        if shape is not None and mask.shape != shape:
            raise CaseError(
                f"label {name!r}: mask {mask.shape}, but the masks before it are {shape}; all must be equal."
            )
        shape = mask.shape
        box = _box(mask)
        if box is None:
            continue
        inside = mask[box] != 0
        index = next((i for i, plane in enumerate(planes) if not plane[box][inside].any()), len(planes))
        if index == len(planes):
            check_bytes(2 * (index + 1) * mask.size)
            planes.append(np.zeros(shape, np.uint8))
            num_values.append(0)
        num_values[index] += 1
        _check_count(num_values[index], f"label {name!r}")
        if num_values[index] == 256:
            planes[index] = planes[index].astype(np.uint16)
        planes[index][box][inside] = num_values[index]
        labels.append(Label(num_values[index], name, index))
    if shape is None:
        raise CaseError("the case has no masks. Check its label folder.")
    return _stack(planes, shape), tuple(labels)


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Return the bounding box of the nonzero voxels in [T, H, W], or None."""
    frames = np.flatnonzero([part.any() for part in mask])
    if not frames.size:
        return None
    projection = np.logical_or.reduce(mask[frames[0] : frames[-1] + 1])
    sides = (frames, np.flatnonzero(projection.any(axis=1)), np.flatnonzero(projection.any(axis=0)))
    return tuple(slice(int(i[0]), int(i[-1]) + 1) for i in sides)
