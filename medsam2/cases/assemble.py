"""Assemble an image and its masks into a `Case`: one grid, upright orientation, named objects."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from medsam2.cases.case import Case, CaseError, CaseRef, Label, Line, Orientation
from medsam2.cases.geometry import CaseWarning, align_mask, default_affine, orientation_of, reorient_affine
from medsam2.cases.objects import apply_labels, pack
from medsam2.cases.raster import MaskRaster, Raster
from medsam2.cases.values import present_values


def assemble(ref: CaseRef, image: Raster, masks: Iterable[MaskRaster], turn: bool = True) -> Case:
    """Assemble the case that `ref` names.

    Args:
        masks: one or several. Several are packed into as few label planes as their overlaps allow; a generator keeps
            only a few of them in memory.
        turn: reorient a volume to upright. Clips in time and single slices are never reoriented.

    Raises:
        CaseError: voxels are not finite, a mask does not fit the image, or labels have no names.
    """
    array = _replace_nonfinite(image, ref.settings.nonfinite)
    orientation = Orientation()
    if turn and not image.moving and array.shape[0] > 1:
        affine = default_affine(image.spacing) if image.affine is None else image.affine
        orientation = orientation_of(affine, ref.settings.axis)
    planes, labels = _label_planes(ref, image, iter(masks))
    shape = array.shape[:3]
    z, y, x = (image.spacing[axis] for axis in orientation.axes)
    case = Case(
        image=orientation.apply(array),
        planes=np.stack([orientation.apply(plane) for plane in planes]) if orientation.turned else planes,
        labels=labels,
        spacing=(z, y, x),
        modality=ref.modality,  # type: ignore[arg-type]  # checked by load
        kind="still" if array.shape[orientation.axes[0]] == 1 else "clip" if image.moving else "volume",
        dataset=ref.dataset,
        case_id=ref.case_id,
        patient_id=ref.patient_id,
        affine=None if image.affine is None else reorient_affine(image.affine, shape, orientation),
        sources=ref.files,
        orientation=orientation,
        window=image.window,
        lines=tuple(_recist_lines(ref, shape, orientation)),
    )
    return apply_labels(case, ref.settings.labels, ref.settings.min_voxels)


def _replace_nonfinite(image: Raster, replacement: float | None) -> np.ndarray:
    """Return the array with NaN and infinite voxels replaced."""
    array = image.array
    if array.dtype.kind != "f" or all(np.isfinite(part).all() for part in array):
        return array
    bad = ~np.isfinite(array)
    if replacement is None:
        raise CaseError(
            f"{image.path}: {int(bad.sum())} voxels are NaN or infinite; replace them in the file, or set "
            "`nonfinite: VALUE` in --config."
        )
    warnings.warn(f"{image.path.name}: {int(bad.sum())} NaN or infinite voxels became {replacement:g}.", CaseWarning, 2)
    return np.where(bad, array.dtype.type(replacement), array)


def _label_planes(ref: CaseRef, image: Raster, masks: Iterator[MaskRaster]) -> tuple[np.ndarray, tuple[Label, ...]]:
    """Return label planes [P, Z, Y, X] on the image's grid, and the labels in them."""
    first, second = next(masks, None), next(masks, None)
    reports: list[str] = []
    if first is None:
        raise CaseError(f"{image.path}: the image has no mask.")
    if second is None:
        result = _one_mask(ref, image, first, reports)
    else:
        result = pack(_structures(ref, image, itertools.chain((first, second), masks), reports))
    if reports:  # with one structure per file, all files give the same report
        more = f" The same applies to {len(reports) - 1} more masks." if len(reports) > 1 else ""
        warnings.warn(reports[0] + more, CaseWarning, stacklevel=3)
    return result


def _structures(
    ref: CaseRef, image: Raster, masks: Iterable[MaskRaster], reports: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, bool mask [Z, Y, X]) for every label of several masks, one at a time to save memory."""
    for mask in masks:
        planes, labels = _one_mask(ref, image, mask, reports, only_mask=False)
        for label in labels:
            yield label.name, planes[label.plane] == label.id


def _one_mask(
    ref: CaseRef, image: Raster, mask: MaskRaster, reports: list[str], only_mask: bool = True
) -> tuple[np.ndarray, tuple[Label, ...]]:
    mask = _threshold(ref, mask)
    planes, report = align_mask(mask, image, only_mask)
    reports += [report] if report else []
    if mask.labels:
        return planes, mask.labels
    if planes.shape[0] != 1:
        raise CaseError(f"{mask.path}: {planes.shape[0]} label planes have no names.")
    if not ref.labels:
        word = "object" if image.moving else "label"
        return planes, tuple(Label(value, f"{word}_{value}") for value in present_values(planes[0]))
    return _apply_declared_labels(ref, planes, mask)


def _apply_declared_labels(ref: CaseRef, planes: np.ndarray, mask: MaskRaster) -> tuple[np.ndarray, tuple[Label, ...]]:
    """Name the values as the dataset declares; each region of several values becomes an additional plane."""
    plain = [(values[0], name) for values, name in ref.labels if len(values) == 1]
    regions = [(values, name) for values, name in ref.labels if len(values) > 1]
    known = {value for values, _ in ref.labels for value in values}
    unknown = [value for value in present_values(planes[0]) if value not in known]
    if unknown:
        raise CaseError(f"{mask.path}: the mask holds {unknown}, but the dataset names only {sorted(known)}.")
    labels = [Label(value, name) for value, name in plain]
    if not regions:
        return planes, tuple(labels)
    region_planes = [np.isin(planes[0], values).astype(planes.dtype) for values, _ in regions]
    first = 1 if plain else 0
    labels += [Label(1, name, plane) for plane, (_, name) in enumerate(regions, start=first)]
    return np.stack(([planes[0]] if plain else []) + region_planes), tuple(labels)


def _threshold(ref: CaseRef, mask: MaskRaster) -> MaskRaster:
    """Apply the threshold to fractions and to values of a lossy format; leave exact label values unchanged."""
    threshold, fractions = ref.settings.threshold, mask.planes.dtype.kind == "f"
    if mask.exact:
        return mask  # a threshold that is set for all datasets must not merge the labels of this one
    if threshold is None:
        what = "fractions, e.g. a probability map" if fractions else "values altered by a lossy format"
        remedy = "0.5" if fractions and mask.planes.max(initial=0) <= 1 else "127"
        raise CaseError(
            f"{mask.path}: the mask holds {what}; set the lower limit of the foreground, e.g. --threshold {remedy}."
        )
    planes = (mask.planes > threshold).astype(np.uint8)
    name = ref.labels[0][1] if len(ref.labels) == 1 else "object"
    labels = tuple(replace(label, id=1) for label in mask.labels)
    labels = labels or tuple(Label(1, name, plane) for plane in range(planes.shape[0]))
    return replace(mask, planes=planes, labels=labels, lossy=False)


def _recist_lines(ref: CaseRef, shape: tuple[int, ...], orientation: Orientation) -> Iterator[Line]:
    """Convert the RECIST lines of the source (slice, x, y, ...) to pixels of the reoriented frames."""
    for index, x0, y0, x1, y1, label in ref.recist:
        frame, v0, u0 = orientation.map_point((index, y0, x0), shape)
        last_frame, v1, u1 = orientation.map_point((index, y1, x1), shape)
        if frame != last_frame:
            warnings.warn("a RECIST line does not lie in one slice and was left out.", CaseWarning, 2)
            continue
        yield Line(int(frame), u0, v0, u1, v1, label)
