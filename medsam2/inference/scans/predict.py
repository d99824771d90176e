"""Predict masks for files, as `medsam2 predict` does, and write them on the grids of the inputs.

Frames are read, predicted and written one by one, so that a long video needs no more memory than a short one.

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
from medsam2.inference.predictor import Predictor
from medsam2.inference.scans.prompts import Prompted, PromptFile, onto_scan
from medsam2.inference.scans.scan import Scan, ScanSettings, open_scan, source_of
from medsam2.inference.scans.spool import Spool, open_spool

if TYPE_CHECKING:
    from medsam2.model.policies import MemorySettings

Progress = Callable[[str, int, int], None]
"""Called with a description of the current step, the number of completed frames and the total number of frames."""


class PredictSettings(BaseModel):
    """Settings of how inputs are predicted and written.

    Attributes:
        checkpoint: a name ("nano") or path. out: a file, or a folder.
        format: a name of `cases.outputs`, or "" to choose by the ending of `out`, else by the input.
        per_object: write one file per object instead of one label map, which preserves overlaps.
        direction: see `ProtocolSettings`. memory: an option of configs/memory/, or "" for SAM 2's policy.
        device: auto, cpu, cuda or cuda:N. precision: fp32 or bf16 (autocast). batch_frames: number of frames per call
            of the image encoder.
        force: replace existing results.
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
    """Result of one input.

    Attributes:
        files: written files or folders. names: names of the objects. counts: voxels of each object as written.
        frames: number of frames of the input. seconds: wall time.
        notes: warnings for the user. error: why nothing was written, or "".
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
    """Destination of the masks of one input: `path` itself, or a file for each object in the folder `path`."""

    source: Path
    output: Output
    path: Path
    per_object: bool

    def path_for(self, name: str) -> Path:
        """Return the path of an object's masks."""
        if not self.per_object:
            return self.path
        return self.path / (_safe_file_name(name) + (self.output.endings[0] if self.output.endings else ""))


def predict_files(
    inputs: Sequence[Path], prompts: PromptFile, settings: PredictSettings, progress: Progress | None = None
) -> Iterator[Written]:
    """Predict every input and write its masks; if one fails, the others are still predicted.

    Raises:
        UserError: before any prediction, if the checkpoint, device, format or memory policy does not exist, or a path
            of a result is taken.
    """
    targets = plan_targets(inputs, settings)
    predictor, note = load_predictor(settings, prompts)
    for target in targets:
        try:
            written = _predict_one(target, inputs, prompts, predictor, settings, progress or (lambda *_: None))
            yield replace(written, notes=(*note, *written.notes))
            note = ()  # it concerns the checkpoint, so it is shown once
        except Exception as error:  # readers raise many types for damaged files; the other inputs are still predicted
            yield Written(target.source, error=_describe_error(error, target))


def _describe_error(error: Exception, target: _Target) -> str:
    """Return in one sentence why an input has no masks."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or target.path}: {error.strerror or error}."
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return f"{target.source}: {type(error).__name__} at {where}: {error}. Report it if the file is sound."


def load_predictor(settings: PredictSettings, prompts: PromptFile) -> tuple[Predictor, tuple[str, ...]]:
    """Load the checkpoint, and return a note if it was not trained with prompts like these.

    Raises:
        UserError: the checkpoint, device or memory policy does not exist.
    """
    from medsam2.model.build import find_device, load_model
    from medsam2.model.policies import make_policy
    from medsam2.model.tracker import Tracker

    device, memory = find_device(settings.device), memory_settings(settings.memory)
    loaded = load_model(settings.checkpoint)
    sam = loaded.sam
    tracker = Tracker(sam, policy=None if memory is None else make_policy(memory, sam)).eval().to(device)
    autocast = torch.bfloat16 if settings.precision == "bf16" else None
    untrained, trained = loaded.provenance.untrained(prompts.rules, False, prompts.has_negatives)
    note = f"{settings.checkpoint} was trained with {trained}, not with {untrained}; check the masks carefully"
    predictor = Predictor(tracker, batch_frames=settings.batch_frames, autocast=autocast)
    return predictor, (note,) if untrained else ()


def memory_settings(name: str) -> MemorySettings | None:
    """Return the settings in configs/memory/NAME.yaml; None for "".

    Raises:
        UserError: there is no such file.
    """
    from medsam2.config import compose
    from medsam2.model.policies import MemorySettings

    if not name:
        return None
    required = ["checkpoint=nano", "data.source=none", "output=none"]  # mandatory keys that are not used here
    return MemorySettings.model_validate(compose("evaluate", [f"memory={name}", *required])["memory"])


# ------------------------------------------------------------------------------------------------------- places


def plan_targets(inputs: Sequence[Path], settings: PredictSettings) -> list[_Target]:
    """Choose and check the destination of every input before anything is predicted.

    Raises:
        UserError: a path is taken, or several results would have one path.
    """
    from medsam2.cases.listing import case_names

    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder.")
    targets: list[_Target] = []
    single = len(inputs) == 1
    names = case_names([Path(os.path.abspath(path)) for path in inputs])  # resolves "." but not symbolic links
    for source, name in zip(inputs, names, strict=True):
        output, is_file = _choose_output(source, settings)
        if is_file and (settings.per_object or not single):
            reason = "--per-object writes several files" if settings.per_object else f"there are {len(inputs)} inputs"
            raise UserError(f"--out {settings.out} is one file, but {reason}; give a folder.")
        folder = settings.per_object or not output.endings
        path = settings.out
        if not (is_file or (single and folder)):
            path = settings.out / (name if folder else name + output.endings[0])
        target = _Target(source, output, path, settings.per_object)
        _refuse_inputs(path, target, inputs)
        if any(path == other.path for other in targets):
            raise UserError(f"{source}: two inputs would write {path}; predict them one after the other.")
        if not target.per_object:
            check_free(path, output, settings.force)
        elif path.is_file():
            raise UserError(f"{path} is a file, but --per-object writes a folder; choose another name.")
        targets.append(target)
    return targets


def _choose_output(source: Path, settings: PredictSettings) -> tuple[Output, bool]:
    """Return the output format of an input, and whether --out is the path of the file itself."""
    kind = ""
    with suppress(Exception):  # a damaged input is reported later, when it is read
        kind = source_of(source)
    output, is_file = output_for(settings.out, kind)
    if not settings.format:
        return output, is_file
    requested = find_output(settings.format)
    if is_file and requested is not output:
        raise UserError(
            f"--out {settings.out} has the ending of {output.name}, --format says {requested.name}; change one."
        )
    return requested, is_file


def _refuse_inputs(path: Path, target: _Target, inputs: Sequence[Path]) -> None:
    """Refuse to overwrite an input, even with --force.

    Raises:
        UserError: `path` is an input, or a folder of masks that would replace a folder with an input in it.
    """
    result, folder = path.resolve(), not (target.output.endings or target.per_object)
    for source in inputs:
        original = source.resolve()
        if (result == original and (folder or source.is_file())) or (folder and result in original.parents):
            raise UserError(f"{path}: masks would overwrite the input {source}; choose another --out.")


def _safe_file_name(name: str) -> str:
    """Replace the characters of an object's name that a file name should not have."""
    safe = "".join(letter if letter.isalnum() or letter in "-_. " else "-" for letter in name).strip(" .")
    return safe or "object"


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
    paths = [target.path_for(name) for name in prompted.names]
    if target.per_object:
        if len(set(paths)) < len(paths):
            raise UserError(
                f"{target.source}: two of the objects {', '.join(prompted.names)} would write one file; rename one."
            )
        for path in paths:
            _refuse_inputs(path, replace(target, per_object=False), inputs)
            check_free(path, target.output, settings.force)
    num_frames = scan.frames_shape[0]
    with open_spool(scan.frames_shape, prompted.values, target.per_object) as spool:
        outputs = list(_masks_by_path(spool, scan, prompted, paths))
        for _, masks in outputs:
            target.output.check(masks)
        completed, step = 0, f"predicting {scan.path.name}"
        progress(step, 0, num_frames)
        for result in predictor.stream(scan.frames, prompted.prompts, settings.direction):
            completed += spool.add(result)
            progress(step, completed, num_frames)
        progress(f"writing {target.path.name}", num_frames, num_frames)
        for path, masks in outputs:
            write_masks(target.output, path, masks, settings.force)
        counts = spool.counts()
    empty = tuple(f"{n!r} is on no frame" for n, count in zip(prompted.names, counts, strict=True) if not count)
    return Written(
        source=target.source,
        files=tuple(dict.fromkeys(paths)),
        names=prompted.names,
        counts=counts,
        frames=num_frames,
        seconds=time.perf_counter() - start,
        notes=scan.notes + empty,
    )


def _masks_by_path(spool: Spool, scan: Scan, prompted: Prompted, paths: Sequence[Path]) -> Iterator[tuple[Path, Masks]]:
    """Yield each path and the masks to write there."""
    label_map = Masks(
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
        yield paths[0], label_map
        return
    for index, (name, path) in enumerate(zip(prompted.names, paths, strict=True)):
        yield path, replace(label_map, names=(name,), values=(1,), labels=partial(spool.mask_of, index))


def _picture(scan: Scan, frame: int) -> np.ndarray:
    """Return a frame as a picture, uint8 [H, W] or [H, W, 3]."""
    pixels = torch.as_tensor(scan.frames[frame]).numpy()
    return np.asarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
