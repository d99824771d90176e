"""What a user says about a scan, from the command line or a json, and the predictor's prompts that it becomes.

Coordinates are indices of voxel centres in the file's own array, counted from 0: a slice (or frame) number along the
axis that is sliced, and x, y along the other two, in the order in which the file has them. For a scan sliced along its
third index that is k, i, j of 3D Slicer and nibabel, and z, x, y of SimpleITK. ITK-SNAP counts from 1.

Legend: N objects, T frames, H and W pixels of the frames, Z, Y, X of the file's array.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medsam2.cases.listing import stem
from medsam2.errors import UserError, did_you_mean
from medsam2.evaluation.predict_scan import Scan, read_mask_like, unnamed
from medsam2.evaluation.predictor import FramePrompt

Numbers4 = tuple[float, float, float, float]
DEFAULT_NAME = "object"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Said(_Model):
    """One prompt on one frame: a box and or points, a RECIST line, or a mask. Several are rounds of correction.

    Attributes:
        frame: slice or frame; with a mask it may be left out: then every slice on which the mask has the value.
        box: (x0, y0, x1, y1), outermost pixels inside. points: (x, y, 1 on the object or 0 off it).
        recist: both ends (x0, y0, x1, y1) of the longest diameter; becomes the square box around the line, of its
            length. mask: a label map on the grid of the scan, relative to the json. value: in that map; 0 is any.
        where: what an error should point at.
    """

    frame: int | None = None
    box: Numbers4 | None = None
    points: tuple[tuple[float, float, int], ...] = ()
    recist: Numbers4 | None = None
    mask: Path | None = None
    value: int = Field(0, ge=0)
    where: str = Field("", exclude=True)

    @model_validator(mode="after")
    def _one_kind(self) -> Said:
        kinds = [bool(self.box or self.points), self.recist is not None, self.mask is not None]
        if sum(kinds) != 1:
            raise ValueError("give a box and or points, or a recist line, or a mask: one of the three")
        if self.frame is None and self.mask is None:
            raise ValueError("frame is missing")
        if any(label not in (0, 1) for *_, label in self.points):
            raise ValueError("a point is [x, y, label] with label 1 (on the object) or 0 (off it)")
        if self.box and not (self.box[0] <= self.box[2] and self.box[1] <= self.box[3]):
            raise ValueError(f"box {_text(self.box)} is not x0,y0,x1,y1 with x0 <= x1 and y0 <= y1")
        return self


class ObjectSaid(_Model):
    """One object: its name, its value in the label map (0: the next free one), and prompts in the order given."""

    name: str = Field(min_length=1)
    value: int = Field(0, ge=0, le=65535)
    prompts: tuple[Said, ...] = Field(min_length=1)


class PromptFile(_Model):
    """A json of prompts: `objects` for every input, or `inputs`: {file name of an input: {"objects": [...]}}.

    Attributes:
        masks: label maps of which each label is an object (`--mask`).
    """

    objects: tuple[ObjectSaid, ...] = ()
    inputs: dict[str, PromptFile] = {}
    masks: tuple[Path, ...] = Field((), exclude=True)

    @property
    def every(self) -> tuple[Said, ...]:
        """All prompts, of every input."""
        own = tuple(said for entry in self.objects for said in entry.prompts)
        return own + tuple(said for entry in self.inputs.values() for said in entry.every)

    @property
    def rules(self) -> tuple[str, ...]:
        """Which rules of `medsam2.prompts.given` would prompt so, in the order of the alphabet."""
        kinds = {"mask": bool(self.masks)}
        for said in self.every:
            found = "box" if said.box else "recist_box" if said.recist else "mask" if said.mask else "click"
            kinds[found] = True
        return tuple(sorted(kind for kind, used in kinds.items() if used))

    @property
    def negatives(self) -> bool:
        """Whether a point is off its object."""
        return any(label == 0 for said in self.every for *_, label in said.points)

    def of(self, path: Path) -> PromptFile:
        """What was said about one input.

        Raises:
            UserError: nothing was.
        """
        own = self.inputs.get(path.name)
        if own is None and self.inputs and not (self.objects or self.masks):
            known = ", ".join(self.inputs)
            hint = did_you_mean(path.name, self.inputs)
            raise UserError(f"{path}: the prompts name {known} under inputs, but not {path.name!r}.{hint}")
        return self if own is None else PromptFile(objects=self.objects + own.objects, masks=self.masks)


@dataclass(frozen=True, eq=False)
class Prompted:
    """N objects: their names, their values in a label map, and the predictor's prompts for them."""

    names: tuple[str, ...]
    values: tuple[int, ...]
    prompts: tuple[FramePrompt, ...]


# -------------------------------------------------------------------------------------------- from what was typed


def from_flags(
    boxes: Sequence[str] = (),
    points: Sequence[str] = (),
    recists: Sequence[str] = (),
    masks: Sequence[Path] = (),
    file: Path | None = None,
) -> PromptFile:
    """Everything that the command line says, as one `PromptFile`.

    A box and points for one object on one slice are one prompt; in a json each entry is a round of its own.

    Raises:
        UserError: nothing was given, or a text that is not of the expected form.
    """
    said = [_box(text, "--box", "box") for text in boxes] + [_box(text, "--recist", "recist") for text in recists]
    clicks = [_point(text) for text in points]
    objects: dict[str, list[Said]] = {}
    for name, entry in [*said, *clicks]:
        rounds = objects.setdefault(name, [])
        same = next((n for n, old in enumerate(rounds) if old.frame == entry.frame), None)
        if same is None or (entry.points and rounds[same].recist):
            rounds.append(entry)
        elif entry.points:
            rounds[same] = rounds[same].model_copy(update={"points": rounds[same].points + entry.points})
        else:
            raise UserError(
                f"{entry.where}: object {name!r} has a box or line on slice {entry.frame} already; for several objects "
                "end each with a name of its own, e.g. ...,left and ...,right."
            )
    written = read_prompts(file) if file else PromptFile()
    typed = tuple(ObjectSaid(name=name, prompts=tuple(rounds)) for name, rounds in objects.items())
    found = written.model_copy(update={"objects": written.objects + typed, "masks": tuple(masks)})
    if not (found.objects or found.inputs or found.masks):
        raise UserError("no prompt: give --box, --point, --recist, --mask or --prompts (see `medsam2 predict --help`).")
    return found


def read_prompts(path: Path) -> PromptFile:
    """The json at `path`; masks that it names are relative to it.

    Raises:
        UserError: not readable, not json, or not of the expected form, with the place and the closest key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--prompts {path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path}: not readable as json ({error}); see docs/predict.md.") from None
    try:
        found = PromptFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        known = sorted({*PromptFile.model_fields, *ObjectSaid.model_fields, *Said.model_fields} - {"where", "masks"})
        hint = did_you_mean(str(first["loc"][-1]), known) if first["type"] == "extra_forbidden" else ""
        text = "no such key" if hint or first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(
            f"--prompts {path}: {place or 'the file'}: {text.removeprefix('Value error, ')}.{hint} See docs/predict.md."
        ) from None
    return _located(found, path, "")


def _located(found: PromptFile, path: Path, prefix: str) -> PromptFile:
    """With the place of every prompt for messages, and with masks beside the json."""
    objects = []
    for number, entry in enumerate(found.objects):
        prompts = tuple(
            said.model_copy(
                update={
                    "where": f"{path}: {prefix}objects[{number}].prompts[{place}]",
                    "mask": None if said.mask is None else path.parent / said.mask,
                }
            )
            for place, said in enumerate(entry.prompts)
        )
        objects.append(entry.model_copy(update={"prompts": prompts}))
    inputs = {name: _located(entry, path, f"inputs[{name!r}].") for name, entry in found.inputs.items()}
    return found.model_copy(update={"objects": tuple(objects), "inputs": inputs})


def _box(text: str, flag: str, kind: str) -> tuple[str, Said]:
    parts = text.split(",", 5)
    numbers = _numbers(parts[:5], 5, f"{flag} {text}", "Z,X0,Y0,X1,Y1[,OBJECT], e.g. 12,40,52,88,97,liver")
    name = parts[5].strip() if len(parts) > 5 else DEFAULT_NAME
    return name or DEFAULT_NAME, _said(
        f"{flag} {text}", frame=_whole(numbers[0], f"{flag} {text}"), **{kind: numbers[1:]}
    )


def _point(text: str) -> tuple[str, Said]:
    where, form = f"--point {text}", "Z,X,Y[,1 or 0][,OBJECT], e.g. 12,60,71 or 12,60,71,0,liver"
    parts = text.split(",")
    z, x, y = _numbers(parts[:3], 3, where, form)
    label, rest = 1, [part.strip() for part in parts[3:]]
    if rest and rest[0].lstrip("+-").isdigit():
        if rest[0] not in ("0", "1"):
            raise UserError(f"{where}: label {rest[0]} is neither 1 (on the object) nor 0 (off it); expected {form}.")
        label, rest = int(rest[0]), rest[1:]
    name = ",".join(rest) or DEFAULT_NAME
    return name, _said(where, frame=_whole(z, where), points=((x, y, label),))


def _said(where: str, **content: Any) -> Said:
    try:
        return Said(where=where, **content)
    except ValidationError as error:
        raise UserError(f"{where}: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None


def _numbers(parts: Sequence[str], count: int, where: str, form: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise UserError(f"{where}: expected {form}.")
    return numbers


def _whole(number: float, where: str) -> int:
    if not number.is_integer():
        raise UserError(f"{where}: slice {number:g} is not a whole number; slices are counted from 0.")
    return int(number)


# ---------------------------------------------------------------------------------------------- onto one scan


def onto_scan(said: PromptFile, scan: Scan) -> Prompted:
    """The prompts for one scan, in the pixels of its frames.

    Raises:
        UserError: a place outside of the scan, a mask that does not fit or is empty, or a value that two objects want.
    """
    own = said.of(scan.path)
    rounds: dict[str, list[FramePrompt]] = {}
    wanted: dict[str, int] = {}
    for path in own.masks:
        for name, value, prompts in _labels(path, scan, several=len(own.masks) > 1):
            name = name if name not in rounds else f"{name}_{value}"  # two labels of one name are two objects
            rounds.setdefault(name, []).extend(prompts)
            if value not in wanted.values():
                wanted[name] = value
    for entry in own.objects:
        prompts = [prompt for one in entry.prompts for prompt in _on_scan(one, scan)]
        rounds.setdefault(entry.name, []).extend(prompts)
        if entry.value:
            wanted[entry.name] = entry.value
    values = _values(tuple(rounds), wanted, scan)
    numbered = [replace(prompt, object=n) for n, prompts in enumerate(rounds.values()) for prompt in prompts]
    return Prompted(tuple(rounds), values, tuple(numbered))


def _values(names: Iterable[str], wanted: dict[str, int], scan: Scan) -> tuple[int, ...]:
    """The value of each object: the one that it asks for, else the lowest that nobody has."""
    owners: dict[int, str] = {}
    for name, value in wanted.items():
        if owners.setdefault(value, name) != name:
            raise UserError(f"{scan.path}: {owners[value]!r} and {name!r} both ask for the value {value}; change one.")
    values = []
    for name in names:
        value = wanted.get(name) or next(v for v in range(1, 1 << 17) if v not in owners)
        owners[value] = name
        values.append(value)
    return tuple(values)


def _on_scan(said: Said, scan: Scan) -> list[FramePrompt]:
    if said.mask is not None:
        return _mask_prompts(said, said.mask, scan)
    assert said.frame is not None
    if said.recist is not None:
        box = _inside(scan, said, np.reshape(said.recist, (2, 2)))
        centre, reach = box.mean(0), np.linalg.norm(box[1] - box[0]) / 2
        last = np.array([scan.width - 1, scan.height - 1])
        square = np.concatenate([np.clip(centre - reach, 0, last), np.clip(centre + reach, 0, last)])
        return [FramePrompt(scan.frame_of(said.frame), 0, box=_four(square))]
    found = None
    if said.box is not None:
        ends = _inside(scan, said, np.reshape(said.box, (2, 2)))
        found = _four(np.concatenate([ends.min(0), ends.max(0)]))  # turning may have swapped the corners
    if not said.points:
        return [FramePrompt(scan.frame_of(said.frame), 0, box=found)]
    points = _inside(scan, said, np.array([point[:2] for point in said.points]))
    labels = np.array([point[2] for point in said.points], np.int32)
    return [FramePrompt(scan.frame_of(said.frame), 0, box=found, points=points.astype(np.float32), labels=labels)]


def _four(values: np.ndarray) -> Numbers4:
    x0, y0, x1, y1 = (float(value) for value in values)
    return x0, y0, x1, y1


def _inside(scan: Scan, said: Said, points: np.ndarray) -> np.ndarray:
    """Points [P, 2] of the file on the frame, checked against the scan's size."""
    assert said.frame is not None
    _, height, width = scan.asked_shape
    _check_frame(scan, said, said.frame)
    for x, y in points:
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            raise UserError(
                f"{said.where}: ({x:g}, {y:g}) is outside of {scan.path}, which has x 0 to {width - 1} "
                f"and y 0 to {height - 1}; {scan.counting}."
            )
    return np.array([scan.to_frame(said.frame, x, y)[1:] for x, y in points], np.float64)


def _check_frame(scan: Scan, said: Said, frame: int) -> None:
    slices = scan.asked_shape[0]
    if not 0 <= frame < slices:
        word = "frame" if scan.moving else "slice"
        raise UserError(
            f"{said.where}: {word} {frame} is outside of {scan.path}, which has {word}s 0 to {slices - 1}; "
            f"{scan.counting}."
        )


def _mask_prompts(said: Said, path: Path, scan: Scan) -> list[FramePrompt]:
    planes, _ = read_mask_like(path, scan)
    mask = np.asarray((planes == said.value if said.value else planes > 0).any(axis=0))
    if said.frame is not None:
        _check_frame(scan, said, said.frame)
    wanted = range(len(mask)) if said.frame is None else [scan.frame_of(said.frame)]
    prompts = [FramePrompt(frame, 0, mask=mask[frame]) for frame in wanted if mask[frame].any()]
    if not prompts:
        what = f"value {said.value}" if said.value else "voxel"
        at = "" if said.frame is None else f" on slice {said.frame}"
        raise UserError(f"{said.where}: {path} has no {what}{at}; give a mask that shows the object.")
    return prompts


def _labels(path: Path, scan: Scan, several: bool) -> list[tuple[str, int, list[FramePrompt]]]:
    """Name, value and prompts of every label of a label map, on each slice that shows it.

    Args:
        several: there are more label maps: the names of their files tell labels without a name apart.
    """
    planes, names = read_mask_like(path, scan)
    found = []
    for plane, value, name in names:
        if several and name == unnamed(value):
            name = stem(path) if len(names) == 1 else f"{stem(path)}_{value}"
        inside = planes[plane] == value
        frames = [FramePrompt(int(t), 0, mask=inside[t]) for t in np.flatnonzero(inside.any((1, 2)))]
        if frames:
            found.append((name, value, frames))
    if not found:
        raise UserError(f"--mask {path}: no labelled voxel in it; give a mask that shows the objects on some slice.")
    return found


def _text(numbers: Iterable[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
