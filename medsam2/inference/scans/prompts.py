"""Read a user's prompts for a scan from the command line or a json, and convert them to the predictor's prompts.

Coordinates are indices of voxel centres in the file's array, counted from 0: a slice (or frame) number along the
sliced axis, and x, y along the other two axes, in the file's order. For a scan sliced along its third index these are
k, i, j in 3D Slicer and nibabel, and z, x, y in SimpleITK. ITK-SNAP counts from 1.

Legend: N objects, T frames, H and W pixels of the frames, Z, Y, X of the file's array.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from medsam2.cases.listing import stem
from medsam2.config import validate
from medsam2.errors import UserError, did_you_mean
from medsam2.inference.predictor import FramePrompt
from medsam2.inference.scans.scan import Scan, default_name, read_mask_like

Numbers4 = tuple[float, float, float, float]
DEFAULT_NAME = "object"
BOX_FORM = "Z,X0,Y0,X1,Y1[,OBJECT], e.g. 12,40,52,88,97,liver"
POINT_FORM = "Z,X,Y[,1 or 0][,OBJECT], e.g. 12,60,71 or 12,60,71,0,liver"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Prompt(_Model):
    """One prompt of one object. Several prompts of an object on one frame are rounds of correction.

    Each kind has a `rule`, the name of the corresponding rule in `medsam2.prompts.evaluation`, and `on_frames`, which
    converts it to the predictor's prompts for a scan. `where` is its command-line flag, for messages.
    """

    where: str = Field("", exclude=True)


class BoxOrPoints(_Prompt):
    """A box (x0, y0, x1, y1), which includes its outermost pixels, and/or points (x, y, 1 on or 0 off the object)."""

    frame: int
    box: Numbers4 | None = None
    points: tuple[tuple[float, float, int], ...] = ()

    @property
    def rule(self) -> str:
        return "box" if self.box else "click"

    @model_validator(mode="after")
    def _check_values(self) -> BoxOrPoints:
        if not (self.box or self.points):
            raise ValueError("give one of these: a box and/or points, a recist line, or a mask")
        if self.box and not (self.box[0] <= self.box[2] and self.box[1] <= self.box[3]):
            text = ",".join(f"{number:g}" for number in self.box)
            raise ValueError(f"box {text} is not x0,y0,x1,y1 with x0 <= x1 and y0 <= y1")
        for *_, label in self.points:
            if label not in (0, 1):
                raise ValueError(f"label {label} is neither 1 (on the object) nor 0 (off it)")
        return self

    def on_frames(self, scan: Scan, where: str, folder: Path) -> list[FramePrompt]:
        corners = np.reshape(self.box or (), (-1, 2))
        frame, places = _on_frame(scan, self.frame, [*corners, *(point[:2] for point in self.points)], where)
        box = _box(places[:2].min(0), places[:2].max(0)) if self.box else None  # reorienting may swap the corners
        if not self.points:
            return [FramePrompt(frame, 0, box)]
        labels = np.array([point[2] for point in self.points], np.int32)
        return [FramePrompt(frame, 0, box, places[len(corners) :].astype(np.float32), labels)]


class RecistLine(_Prompt):
    """Both ends (x0, y0, x1, y1) of the longest diameter, which becomes a square box of this side around its centre."""

    rule: ClassVar[str] = "recist_box"

    frame: int
    recist: Numbers4

    def on_frames(self, scan: Scan, where: str, folder: Path) -> list[FramePrompt]:
        frame, ends = _on_frame(scan, self.frame, np.reshape(self.recist, (2, 2)), where)
        centre, radius = ends.mean(0), np.linalg.norm(ends[1] - ends[0]) / 2
        _, height, width = scan.frames_shape
        return [FramePrompt(frame, 0, _box(*np.clip([centre - radius, centre + radius], 0, (width - 1, height - 1))))]


class MaskOfObject(_Prompt):
    """A label map on the grid of the scan, and the value of the object in it; 0 for all values.

    Attributes:
        frame: None for every slice on which the mask has the value.
    """

    rule: ClassVar[str] = "mask"

    frame: int | None = None
    mask: Path
    value: int = Field(0, ge=0)

    def on_frames(self, scan: Scan, where: str, folder: Path) -> list[FramePrompt]:
        frame = None if self.frame is None else _on_frame(scan, self.frame, (), where)[0]
        planes, _ = read_mask_like(folder / self.mask, scan)
        mask = np.asarray((planes == self.value if self.value else planes > 0).any(axis=0))
        prompts = [prompt for prompt in _mask_prompts(mask) if frame in (None, prompt.frame)]
        if not prompts:
            what = f"value {self.value}" if self.value else "voxel"
            at = "" if frame is None else f" on slice {self.frame}"
            raise UserError(f"{where}: {folder / self.mask} has no {what}{at}; give a mask that shows the object.")
        return prompts


AnyPrompt = BoxOrPoints | RecistLine | MaskOfObject
Prompt = Annotated[
    Annotated[BoxOrPoints, Tag("box or points")]
    | Annotated[RecistLine, Tag("recist")]
    | Annotated[MaskOfObject, Tag("mask")],
    Discriminator(lambda content: next((kind for kind in ("mask", "recist") if kind in content), "box or points")),
]


class ObjectPrompts(_Model):
    """One object: its name, its value in the label map (0 for the next free value), and its prompts in order."""

    name: str = Field(min_length=1)
    value: int = Field(0, ge=0, le=65535)
    prompts: tuple[Prompt, ...] = Field(min_length=1)


class PromptFile(_Model):
    """Content of a prompt json: `objects` for every input, or `inputs`: {file name of an input: {"objects": [...]}}.

    Attributes:
        masks: label maps, each label of which is an object (`--mask`). folder: the folder of masks named in the json.
    """

    objects: tuple[ObjectPrompts, ...] = ()
    inputs: dict[str, PromptFile] = {}
    masks: tuple[Path, ...] = Field((), exclude=True)
    folder: Path = Field(Path(), exclude=True)

    @property
    def all_prompts(self) -> tuple[AnyPrompt, ...]:
        """The prompts of all inputs."""
        shared = tuple(prompt for entry in self.objects for prompt in entry.prompts)
        return shared + tuple(prompt for entry in self.inputs.values() for prompt in entry.all_prompts)

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the corresponding rules in `medsam2.prompts.evaluation`, sorted."""
        return tuple(sorted({prompt.rule for prompt in self.all_prompts} | ({"mask"} if self.masks else set())))

    @property
    def has_negatives(self) -> bool:
        """Whether there is a point off its object."""
        return any(label == 0 for p in self.all_prompts if isinstance(p, BoxOrPoints) for *_, label in p.points)

    def for_input(self, path: Path) -> PromptFile:
        """Return the prompts for one input.

        Raises:
            UserError: there are no prompts for it.
        """
        specific = self.inputs.get(path.name)
        if specific is None and self.inputs and not (self.objects or self.masks):
            names = ", ".join(self.inputs)
            hint = did_you_mean(path.name, self.inputs)
            raise UserError(f"{path}: the prompts name {names} under inputs, but not {path.name!r}.{hint}")
        return self if specific is None else self.model_copy(update={"objects": self.objects + specific.objects})


@dataclass(frozen=True, eq=False)
class Prompted:
    """N prompted objects: their names, their values in a label map, and the predictor's prompts for them."""

    names: tuple[str, ...]
    values: tuple[int, ...]
    prompts: tuple[FramePrompt, ...]


# ------------------------------------------------------------------------------------- the command line, the json


def from_flags(
    boxes: Sequence[str] = (),
    points: Sequence[str] = (),
    recists: Sequence[str] = (),
    masks: Sequence[Path] = (),
    file: Path | None = None,
) -> PromptFile:
    """Parse all prompts of the command line into one `PromptFile`.

    Flags for a box and for points of one object on one slice form one prompt; in a json each entry is a separate round.

    Raises:
        UserError: there is no prompt, or a text does not have the expected form.
    """
    objects: dict[str, dict[tuple[int, bool], dict[str, Any]]] = {}
    for flag, texts in (("box", boxes), ("recist", recists), ("points", points)):
        for text in texts:
            where = f"--{flag.removesuffix('s')} {text}"
            name, frame, value = _parse_flag(where, text, flag == "points")
            rounds = objects.setdefault(name, {})
            if flag != "points" and {(frame, False), (frame, True)} & rounds.keys():
                raise UserError(
                    f"{where}: object {name!r} already has a box or line on slice {frame}; for several objects end "
                    "each with a different name, e.g. ...,left and ...,right."
                )
            content = rounds.setdefault((frame, flag == "recist"), {"frame": frame, "where": where})
            content[flag] = (*content.get(flag, ()), *value)
    from_json = read_prompts(file) if file else PromptFile()
    parsed = tuple(_object_prompts(name, list(rounds.values())) for name, rounds in objects.items())
    if not (parsed or masks or from_json.objects or from_json.inputs):
        raise UserError("no prompt: give --box, --point, --recist, --mask or --prompts (see `medsam2 predict --help`).")
    return from_json.model_copy(update={"objects": from_json.objects + parsed, "masks": tuple(masks)})


def _parse_flag(where: str, text: str, is_point: bool) -> tuple[str, int, tuple[Any, ...]]:
    """Return the object's name, the slice, and the numbers of a flag; for a point one tuple (x, y, label)."""
    parts = [part.strip() for part in text.split(",")]
    count, form = (3, POINT_FORM) if is_point else (5, BOX_FORM)
    try:
        numbers = [float(part) for part in parts[:count]]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise UserError(f"{where}: expected {form}.")
    if not numbers[0].is_integer():
        raise UserError(f"{where}: slice {numbers[0]:g} is not a whole number; slices are counted from 0.")
    value: tuple[Any, ...] = tuple(numbers[1:])
    name = parts[count:]
    if is_point:
        label = int(name.pop(0)) if name and name[0].lstrip("+-").isdecimal() else 1
        value = ((*value, label),)
    return ",".join(name) or DEFAULT_NAME, int(numbers[0]), value


def _object_prompts(name: str, rounds: list[dict[str, Any]]) -> ObjectPrompts:
    """Validate the prompts of one object; an error names the flag."""
    try:
        return ObjectPrompts.model_validate({"name": name, "prompts": rounds})
    except ValidationError as error:
        first = error.errors()[0]
        where = rounds[int(first["loc"][1])]["where"]
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}.") from None


def read_prompts(path: Path) -> PromptFile:
    """Read the prompt json at `path`; the paths of masks in it are relative to its folder.

    Raises:
        UserError: the file cannot be read, is not json, or does not have the expected form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--prompts {path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path}: not readable as json ({error}); see docs/how-to/predict.md.") from None
    return validate(PromptFile, content, f"--prompts {path}").model_copy(update={"folder": path.parent})


# ---------------------------------------------------------------------------------------------- onto one scan


def onto_scan(prompts: PromptFile, scan: Scan) -> Prompted:
    """Convert the prompts for one scan to the pixels of its frames.

    Raises:
        UserError: a coordinate is outside the scan, a mask does not fit or is empty, or two objects have one value.
    """
    prompts = prompts.for_input(scan.path)
    rounds: dict[str, list[FramePrompt]] = {}
    values: dict[str, int] = {}
    for path in prompts.masks:
        for name, value, on_frames in _label_prompts(path, scan, several=len(prompts.masks) > 1):
            options = (name, f"{name}_{value}", *(f"{name}_{value}_{n}" for n in range(2, len(rounds) + 3)))
            name = next(option for option in options if option not in rounds)  # labels with equal names stay separate
            rounds[name] = on_frames
            if value not in values.values():
                values[name] = value
    for entry in prompts.objects:
        for number, prompt in enumerate(entry.prompts):
            where = prompt.where or f"--prompts: object {entry.name!r}, prompt {number + 1}"
            rounds.setdefault(entry.name, []).extend(prompt.on_frames(scan, where, prompts.folder))
        if entry.value:
            values[entry.name] = entry.value
    numbered = [replace(prompt, object=n) for n, on_frames in enumerate(rounds.values()) for prompt in on_frames]
    return Prompted(tuple(rounds), _all_values(rounds, values, scan), tuple(numbered))


def _all_values(names: Iterable[str], values: Mapping[str, int], scan: Scan) -> tuple[int, ...]:
    """Return the value of each object: the requested one, else the lowest free one."""
    owners: dict[int, str] = {}
    for name, value in values.items():
        if owners.setdefault(value, name) != name:
            raise UserError(f"{scan.path}: {owners[value]!r} and {name!r} both have the value {value}; change one.")
    free = (value for value in range(1, 1 << 17) if value not in owners)
    return tuple(values[name] if name in values else next(free) for name in names)


def _box(low: np.ndarray, high: np.ndarray) -> Numbers4:
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _on_frame(scan: Scan, index: int, points: Sequence[Any] | np.ndarray, where: str) -> tuple[int, np.ndarray]:
    """Return the frame of slice `index` of the file, and points (x, y) of that slice on the frame, float [P, 2].

    Raises:
        UserError: the slice or a point is outside the scan.
    """
    slices, height, width = scan.prompt_shape
    word = "frame" if scan.moving else "slice"
    limits = f"which has {word}s 0 to {slices - 1}"
    outside = None if 0 <= index < slices else f"{word} {index}"
    for x, y in () if outside else points:
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            outside, limits = f"({x:g}, {y:g})", f"which has x 0 to {width - 1} and y 0 to {height - 1}"
            break
    if outside:
        raise UserError(f"{where}: {outside} is outside of {scan.path}, {limits}; {scan.coordinates}.")
    places = [scan.to_frame(index, x, y)[1:] for x, y in points]
    return scan.to_frame(index, 0, 0)[0], np.reshape(np.array(places, np.float64), (-1, 2))


def _mask_prompts(mask: np.ndarray) -> list[FramePrompt]:
    """Return a prompt for each frame on which `mask` bool [T, H, W] is not empty."""
    return [FramePrompt(int(t), 0, mask=mask[t]) for t in np.flatnonzero(mask.any((1, 2)))]


def _label_prompts(path: Path, scan: Scan, several: bool) -> list[tuple[str, int, list[FramePrompt]]]:
    """Return name, value and prompts of every label of a label map, one prompt per slice with the label.

    Args:
        several: whether there are several label maps; labels without a name are then named after their files.
    """
    planes, labels = read_mask_like(path, scan)
    entries = []
    for plane, value, name in labels:
        if several and name == default_name(value):
            name = stem(path) if len(labels) == 1 else f"{stem(path)}_{value}"
        if prompts := _mask_prompts(planes[plane] == value):
            entries.append((name, value, prompts))
    if not entries:
        raise UserError(f"--mask {path}: no labelled voxel in it; give a mask that shows the objects on some slice.")
    return entries
