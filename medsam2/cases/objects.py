"""From the labels of a source to the objects of a data set: renamed, merged, chosen, split into instances, packed.

Everything works plane by plane and slice by slice: a case of a hundred structures is never unfolded into as many masks.
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
    """An object in the making: the (plane, id) pairs of the source that it is made of, ascending."""

    name: str
    parts: tuple[tuple[int, int], ...]

    @property
    def planes(self) -> set[int]:
        return {plane for plane, _ in self.parts}

    def values(self, plane: int) -> tuple[int, ...]:
        return tuple(value for of_plane, value in self.parts if of_plane == plane)


def apply_labels(case: Case, rules: LabelRules, min_voxels: int) -> Case:
    """The case with the labels that `rules` ask for, and without objects of fewer than `min_voxels` voxels.

    Labels of different names that get one name become one object (in a plane of its own if the source held them in
    several), as do all that a `merge` names. Labels that share a name from the start, as instances do, stay apart.
    Values are renumbered from 1 in every plane: in the order of the source's ids, and after these the instances, those
    of one structure by their first voxel.
    With nothing to do the case itself comes back.

    Raises:
        CaseError: `keep` leaves no label, or a plane would need more than 65535 values.
    """
    if rules == LabelRules() and min_voxels <= 1:
        return case
    objects = _objects(case.labels, rules)
    lines = tuple(
        replace(line, label=name) for line in case.lines if _kept(name := _renamed(line.label, rules)[0], rules)
    )
    if rules.keep and not objects and not lines and (case.labels or case.lines):
        raise CaseError(_nothing_kept(case, rules))
    sources = [
        (plane, [(o.name, o.values(index)) for o in objects if o.planes == {index}])
        for index, plane in enumerate(case.planes)
    ]
    spanning = [o for o in objects if len(o.planes) > 1]
    if spanning:
        packed, of_packed = pack((o.name, _union(case.planes, o)) for o in spanning)
        sources += [
            (plane, [(label.name, (label.id,)) for label in of_packed if label.plane == index])
            for index, plane in enumerate(packed)
        ]
    planes: list[np.ndarray] = []
    labels: list[Label] = []
    for plane, named_values in sources:
        new, names = _rewritten(plane, named_values, rules.instances, min_voxels, case.where)
        if names:
            labels += [Label(value, name, len(planes)) for value, name in enumerate(names, start=1)]
            planes.append(new)
    return replace(case, planes=_stack(planes, case.planes.shape[1:]), labels=tuple(labels), lines=lines)


def _nothing_kept(case: Case, rules: LabelRules) -> str:
    names = [label.name for label in case.labels] + [line.label for line in case.lines]
    available = sorted({_renamed(name, rules)[0] for name in names})
    dropped = f" and drop {', '.join(rules.drop)}" if rules.drop else ""
    return (
        f"{case.where}: labels: keep {', '.join(rules.keep)}{dropped} leaves none of {', '.join(available)}. "
        "Name at least one of these (after renaming and merging), or leave the case out."
    )


def _matches(name: str, pattern: str) -> bool:
    """An exact name comes first: names may hold brackets, which mean something else in a pattern."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _renamed(name: str, rules: LabelRules) -> tuple[str, bool]:
    """The name after `rename` and `merge`, and whether a merge named it."""
    if name in rules.rename:
        name = rules.rename[name]
    else:
        name = next((new for old, new in rules.rename.items() if fnmatch.fnmatchcase(name, old)), name)
    for new, patterns in rules.merge.items():
        if any(_matches(name, pattern) for pattern in patterns):
            return new, True
    # what bears the name of a merge already belongs to it as well
    return name, name in rules.merge


def _kept(name: str, rules: LabelRules) -> bool:
    if rules.keep and not any(_matches(name, pattern) for pattern in rules.keep):
        return False
    return not any(_matches(name, pattern) for pattern in rules.drop)


def _objects(labels: Sequence[Label], rules: LabelRules) -> list[_Object]:
    """The objects that the labels become, in the order of their first (plane, id)."""
    groups: dict[str, list[tuple[int, int]]] = {}
    sources: dict[str, set[str]] = {}
    merged: set[str] = set()
    for part, old in sorted({(label.plane, label.id): label.name for label in labels}.items()):
        name, in_merge = _renamed(old, rules)
        if not _kept(name, rules):
            continue
        groups.setdefault(name, []).append(part)
        sources.setdefault(name, set()).add(old)
        if in_merge:
            merged.add(name)
    made = []
    for name, parts in groups.items():
        if name in merged or len(sources[name]) > 1:
            made.append(_Object(name, tuple(parts)))
        else:  # one name in the source for several values: instances already
            made += [_Object(name, (part,)) for part in parts]
    return sorted(made, key=lambda o: o.parts)


def _rewritten(
    plane: np.ndarray,
    objects: Sequence[tuple[str, tuple[int, ...]]],
    instances: Sequence[str],
    min_voxels: int,
    where: str,
) -> tuple[np.ndarray, list[str]]:
    """A plane [T, H, W] of which the values 1, 2 ... are the objects, and the name of each value.

    Args:
        objects: (name, values in `plane`). instances: names of which every 26-connected part gets a value of its own,
            after the values that stay whole.
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
    out = _looked_up(plane, table)
    for name, values in split:
        mask = _holding(plane, values)
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


def _looked_up(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table[value] of every voxel; the last entry of `table` stands for all values beyond, the first for negatives."""
    out = np.empty(plane.shape, table.dtype)
    for source, target in zip(plane, out, strict=True):
        np.take(table, source.astype(np.intp), out=target, mode="clip")
    return out


def _holding(plane: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """bool [T, H, W]: where a plane has one of these values."""
    table = np.zeros(max(values) + 2, np.bool_)
    table[list(values)] = True
    return _looked_up(plane, table)


def _union(planes: np.ndarray, item: _Object) -> np.ndarray:
    """bool [T, H, W] of an object that several planes hold parts of."""
    union = np.zeros(planes.shape[1:], np.bool_)
    for index in item.planes:
        union |= _holding(planes[index], item.values(index))
    return union


def _stack(planes: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """[P, T, H, W] with at least one plane of `shape`; one plane is not copied."""
    if not planes:
        return np.zeros((1, *shape), np.uint8)
    return planes[0][None] if len(planes) == 1 else np.stack(planes)


def pack(
    masks: Iterable[tuple[str, np.ndarray]],
    shape: tuple[int, ...] | None = None,
    check_bytes: Callable[[int], None] = lambda size: None,
) -> tuple[np.ndarray, tuple[Label, ...]]:
    """Masks that may overlap -> label planes: each mask goes into the first plane in which its voxels are free.

    Args:
        masks: (name, [T, H, W]), one shape for all; what is not 0 is inside. A generator is best: one mask is held at
            a time. Masks without a voxel get no label.
        shape: [T, H, W], where there may be no mask at all. check_bytes: raises where so many bytes are too many.

    Returns:
        planes: [P, T, H, W] uint8, or uint16 where a plane holds more than 255 masks; P is at least 1.
        labels: in the order of the masks.

    Raises:
        CaseError: no mask and no shape, masks of different shapes, or more than 65535 in a plane.
    """
    planes: list[np.ndarray] = []
    used: list[int] = []
    labels: list[Label] = []
    for name, mask in masks:
        if shape is not None and mask.shape != shape:
            raise CaseError(f"label {name!r}: mask {mask.shape}, but the masks before it are {shape}; all must agree.")
        shape = mask.shape
        box = _box(mask)
        if box is None:
            continue
        inside = mask[box] != 0
        index = next((i for i, plane in enumerate(planes) if not plane[box][inside].any()), len(planes))
        if index == len(planes):
            check_bytes(2 * (index + 1) * mask.size)
            planes.append(np.zeros(shape, np.uint8))
            used.append(0)
        used[index] += 1
        _check_count(used[index], f"label {name!r}")
        if used[index] == 256:
            planes[index] = planes[index].astype(np.uint16)
        planes[index][box][inside] = used[index]
        labels.append(Label(used[index], name, index))
    if shape is None:
        raise CaseError("no masks to pack: the case has no label file. Check its label folder.")
    return _stack(planes, shape), tuple(labels)


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box around what is not 0 in [T, H, W], or None."""
    frames = np.flatnonzero([part.any() for part in mask])
    if not frames.size:
        return None
    shadow = np.logical_or.reduce(mask[frames[0] : frames[-1] + 1])
    sides = (frames, np.flatnonzero(shadow.any(axis=1)), np.flatnonzero(shadow.any(axis=0)))
    return tuple(slice(int(i[0]), int(i[-1]) + 1) for i in sides)
