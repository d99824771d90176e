"""`medsam2 predict` without its command line: scans and prompts in, mask files on the scans' own grids out.

Frames are read, predicted and written one by one: a long video takes no more memory than a short one.

Legend: N objects, T frames, H and W pixels.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from medsam2.cases.outputs import Masks, Output, check_free, find_output, output_for, write_masks
from medsam2.errors import UserError
from medsam2.evaluation.protocol.protocols import untrained
from medsam2.inference.predictor import Predictor
from medsam2.inference.scans.prompts import Prompted, PromptFile, onto_scan
from medsam2.inference.scans.scan import Scan, ScanSettings, open_scan, source_of
from medsam2.inference.scans.spool import Spool, open_spool

if TYPE_CHECKING:
    from medsam2.model.policies import MemorySettings

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many frames are done and of how many."""


class PredictSettings(BaseModel):
    """How inputs are predicted and written.

    Attributes:
        checkpoint: a name ("nano") or path. out: a file, or a folder.
        format: a name of `cases.outputs`, or "" to decide by the ending of `out`, else by the input.
        per_object: a file an object instead of one label map, so that overlaps are kept.
        direction: see `ProtocolSettings`. memory: an option of configs/memory/, or "" for the checkpoint's own.
        device: auto, cpu, cuda or cuda:N. precision: fp32 or bf16 (autocast). batch_frames: frames in one call of the
            image encoder.
        force: replace what is at the place of a result.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    out: Path
    format: str = ""
    per_object: bool = False
    direction: Literal["both", "forward", "backward", "both_apart", "front_to_end"] = "both"
    memory: str = ""
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_frames: int = 8
    force: bool = False
    scan: ScanSettings = ScanSettings()


@dataclass(frozen=True)
class Written:
    """What came of one input.

    Attributes:
        files: written files or folders. names: of the objects. counts: voxels of each object as written.
        frames: of the input. seconds: wall time.
        notes: what its owner should know. error: why nothing was written, or "".
    """

    source: Path
    files: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    frames: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class _Target:
    """Where the masks of one input go: `path` itself, or a file for each object in the folder `path`."""

    source: Path
    output: Output
    path: Path
    per_object: bool

    def of(self, name: str) -> Path:
        """The place of the object's own file."""
        if not self.per_object:
            return self.path
        return self.path / (_safe(name) + (self.output.endings[0] if self.output.endings else ""))


def predict_files(
    inputs: Sequence[Path], prompts: PromptFile, settings: PredictSettings, progress: Progress | None = None
) -> Iterator[Written]:
    """Predict every input and write its masks; one that fails does not end the run.

    Raises:
        UserError: what holds for all inputs: no such checkpoint, device, format or memory policy, or a place that is
            taken. Nothing has been predicted then.
    """
    targets = plan_targets(inputs, settings)
    predictor, note = load_predictor(settings, prompts)
    for target in targets:
        try:
            written = _predict_one(target, inputs, prompts, predictor, settings, progress or (lambda *_: None))
            yield replace(written, notes=(*note, *written.notes))
            note = ()  # it is of the checkpoint: shown once
        except Exception as error:  # whatever a reader meets in a damaged file: the other inputs are still predicted
            yield Written(target.source, error=_reason(error, target))


def _reason(error: Exception, target: _Target) -> str:
    """Why an input has no masks, in one sentence."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or target.path}: {error.strerror or error}."
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return f"{target.source}: {type(error).__name__} at {where}: {error}. Report it if the file is sound."


def load_predictor(settings: PredictSettings, prompts: PromptFile) -> tuple[Predictor, tuple[str, ...]]:
    """The checkpoint on its device, and a note where it was not trained with prompts like these.

    Raises:
        UserError: no such checkpoint, device or memory policy.
    """
    from medsam2.evaluation.run.checkpoints import find_device
    from medsam2.model.build import load_model
    from medsam2.model.policies import make_policy
    from medsam2.model.tracker import Tracker

    device, memory = find_device(settings.device), memory_settings(settings.memory)
    loaded = load_model(settings.checkpoint)
    sam = loaded.sam
    tracker = Tracker(sam, policy=None if memory is None else make_policy(memory, sam)).eval().to(device)
    autocast = torch.bfloat16 if settings.precision == "bf16" else None
    missing, known = untrained(prompts.rules, False, prompts.negatives, loaded.provenance)
    note = (f"{settings.checkpoint} was trained with {known}, not with {missing}; look twice",) if missing else ()
    return Predictor(tracker, batch_frames=settings.batch_frames, autocast=autocast), note


def memory_settings(name: str) -> MemorySettings | None:
    """The settings in configs/memory/NAME.yaml; None for "".

    Raises:
        UserError: there is none of this name.
    """
    from medsam2.config import compose
    from medsam2.model.policies import MemorySettings

    if not name:
        return None
    required = ["checkpoint=nano", "data.source=none", "output=none"]  # the composition insists on these keys
    return MemorySettings.model_validate(compose("evaluate", [f"memory={name}", *required])["memory"])


# ------------------------------------------------------------------------------------------------------- places


def plan_targets(inputs: Sequence[Path], settings: PredictSettings) -> list[_Target]:
    """Where the masks of each input go, before hours of work and not after.

    Raises:
        UserError: a place that is taken, one file for several results, or two results of one name.
    """
    from medsam2.cases.listing import case_names

    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder.")
    targets: list[_Target] = []
    alone = len(inputs) == 1
    names = case_names([Path(os.path.abspath(path)) for path in inputs])  # "." has a name, and links keep theirs
    for source, name in zip(inputs, names, strict=True):
        output, is_file = _output(source, settings)
        if is_file and (settings.per_object or not alone):
            reason = "--per-object writes several files" if settings.per_object else f"there are {len(inputs)} inputs"
            raise UserError(f"--out {settings.out} is one file, but {reason}; give a folder.")
        folder = settings.per_object or not output.endings
        path = settings.out
        if not (is_file or (alone and folder)):
            path = settings.out / (name if folder else name + output.endings[0])
        target = _Target(source, output, path, settings.per_object)
        _keep_inputs(path, target, inputs)
        if any(path == other.path for other in targets):
            raise UserError(f"{source}: two inputs would write {path}; predict them one after the other.")
        if not target.per_object:
            check_free(path, output, settings.force)
        elif path.is_file():
            raise UserError(f"{path} is a file, but --per-object writes a folder; choose another name.")
        targets.append(target)
    return targets


def _output(source: Path, settings: PredictSettings) -> tuple[Output, bool]:
    """The format for the masks of an input, and whether --out names the file itself."""
    kind = ""
    with suppress(Exception):  # a damaged input is reported when it is read, among the others
        kind = source_of(source)
    output, is_file = output_for(settings.out, kind)
    if not settings.format:
        return output, is_file
    asked = find_output(settings.format)
    if is_file and asked is not output:
        raise UserError(
            f"--out {settings.out} has the ending of {output.name}, --format says {asked.name}; change one."
        )
    return asked, is_file


def _keep_inputs(path: Path, target: _Target, inputs: Sequence[Path]) -> None:
    """Refuse to write over an input, also with --force.

    Raises:
        UserError: `path` is an input, or a folder of masks that would take the place of one that holds an input.
    """
    place, folder = path.resolve(), not (target.output.endings or target.per_object)
    for source in inputs:
        taken = source.resolve()
        if (place == taken and (folder or source.is_file())) or (folder and place in taken.parents):
            raise UserError(f"{path}: masks would take the place of the input {source}; choose another --out.")


def _safe(name: str) -> str:
    """An object's name as a file's name."""
    kept = "".join(letter if letter.isalnum() or letter in "-_. " else "-" for letter in name).strip(" .")
    return kept or "object"


# -------------------------------------------------------------------------------------------------- one input


def _predict_one(
    target: _Target,
    inputs: Sequence[Path],
    prompts: PromptFile,
    predictor: Predictor,
    settings: PredictSettings,
    progress: Progress,
) -> Written:
    start = time.perf_counter()
    progress(f"reading {target.source.name}", 0, 0)
    scan = open_scan(target.source, settings.scan)
    prompted = onto_scan(prompts, scan)
    places = [target.of(name) for name in prompted.names]
    if target.per_object:
        if len(set(places)) < len(places):
            raise UserError(f"{target.source}: objects {', '.join(prompted.names)}: two would write one file; rename.")
        for place in places:
            _keep_inputs(place, replace(target, per_object=False), inputs)
            check_free(place, target.output, settings.force)
    shape = scan.frames_shape
    with open_spool(shape, prompted.values, target.per_object) as spool:
        results = list(_results(spool, scan, prompted, places))
        for _, masks in results:
            target.output.check(masks)
        done, what = 0, f"predicting {scan.path.name}"
        progress(what, 0, shape[0])
        for result in predictor.stream(scan.frames, prompted.prompts, settings.direction):
            done += spool.add(result)
            progress(what, done, shape[0])
        progress(f"writing {target.path.name}", shape[0], shape[0])
        for place, masks in results:
            write_masks(target.output, place, masks, settings.force)
        counts = spool.counts()
    empty = tuple(f"{n!r} was found nowhere" for n, count in zip(prompted.names, counts, strict=True) if not count)
    return Written(
        source=target.source,
        files=tuple(dict.fromkeys(places)),
        names=prompted.names,
        counts=counts,
        frames=shape[0],
        seconds=time.perf_counter() - start,
        notes=scan.notes + empty,
    )


def _results(spool: Spool, scan: Scan, prompted: Prompted, places: Sequence[Path]) -> Iterator[tuple[Path, Masks]]:
    """What is written where."""
    whole = Masks(
        names=prompted.names,
        values=prompted.values,
        shape=spool.shape,
        labels=spool.labels,
        picture=partial(_picture, scan),
        spacing=scan.spacing,
        moving=scan.moving,
        orientation=scan.orientation,
        affine=scan.affine,
        sources=scan.files,
        stems=scan.stems,
        where=str(scan.path),
    )
    if not spool.separate:
        yield places[0], whole
        return
    for index, (name, place) in enumerate(zip(prompted.names, places, strict=True)):
        yield place, replace(whole, names=(name,), values=(1,), labels=partial(spool.mask_of, index))


def _picture(scan: Scan, frame: int) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3]."""
    pixels = torch.as_tensor(scan.frames[frame]).numpy()
    return np.asarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
