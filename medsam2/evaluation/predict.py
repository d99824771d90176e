"""`medsam2 predict` without its command line: scans and prompts in, mask files on the scans' own grids out.

Frames are read, predicted and written one by one: a long video takes no more memory than a short one.

Legend: N objects, T frames, H and W pixels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from medsam2.cases.outputs import Masks, Output, check_free, find_output, output_for, write_masks
from medsam2.errors import UserError, did_you_mean
from medsam2.evaluation.predict_prompts import Prompted, PromptFile, onto_scan
from medsam2.evaluation.predict_scan import Scan, ScanSettings, open_scan, source_of
from medsam2.evaluation.predict_spool import Spool, open_spool
from medsam2.evaluation.predictor import Predictor
from medsam2.evaluation.protocols import untrained
from medsam2.evaluation.settings import Direction

if TYPE_CHECKING:
    from medsam2.model.policies import MemorySettings

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many frames are done and of how many."""


@dataclass(frozen=True)
class PredictSettings:
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

    checkpoint: str
    out: Path
    format: str = ""
    per_object: bool = False
    direction: Direction = "both"
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
    inputs: Sequence[Path], said: PromptFile, settings: PredictSettings, progress: Progress | None = None
) -> Iterator[Written]:
    """Predict every input and write its masks; one that fails does not end the run.

    Raises:
        UserError: what holds for all inputs: no such checkpoint, device, format or memory policy, or a place that is
            taken. Nothing has been predicted then.
    """
    targets = plan_targets(inputs, settings)
    predictor, note = load_predictor(settings, said)
    for target in targets:
        try:
            done = _predict_one(target, inputs, said, predictor, settings, progress or _silent)
            yield replace(done, notes=(*note, *done.notes))
            note = ()  # it is of the checkpoint: said once
        except UserError as error:
            yield Written(target.source, error=str(error))
        except OSError as error:
            yield Written(target.source, error=f"{error.filename or target.path}: {error.strerror or error}.")


def _silent(what: str, done: int, total: int) -> None:
    """No bar."""


def load_predictor(settings: PredictSettings, said: PromptFile) -> tuple[Predictor, tuple[str, ...]]:
    """The checkpoint on its device, and a note where it was not trained with prompts like these.

    Raises:
        UserError: no such checkpoint, device or memory policy.
    """
    from medsam2.evaluation.contestants import find_device
    from medsam2.model.build import load_model
    from medsam2.model.policies import make_policy
    from medsam2.model.tracker import Tracker

    device, memory = find_device(settings.device), memory_settings(settings.memory)
    loaded = load_model(settings.checkpoint)
    sam = loaded.sam
    tracker = Tracker(sam, policy=None if memory is None else make_policy(memory, sam)).eval().to(device)
    autocast = torch.bfloat16 if settings.precision == "bf16" else None
    missing, known = untrained(said.rules, False, said.negatives, loaded.metadata)
    note = (f"{settings.checkpoint} was trained with {known}, not with {missing}; look twice",) if missing else ()
    return Predictor(tracker, batch_frames=settings.batch_frames, autocast=autocast), note


def memory_settings(name: str) -> MemorySettings | None:
    """What configs/memory/NAME.yaml says; None for "".

    Raises:
        UserError: there is none of this name.
    """
    if not name:
        return None
    import yaml

    from medsam2.config import configs_dir
    from medsam2.model.policies import MemorySettings

    folder = configs_dir() / "memory"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"--memory {name!r} is not one of {', '.join(known)}.{did_you_mean(name, known)}")
    return MemorySettings.model_validate(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))


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
    targets, alone = [], len(inputs) == 1
    names = case_names([Path(os.path.abspath(path)) for path in inputs])  # "." has a name, and links keep theirs
    for path, name in zip(inputs, names, strict=True):
        output, is_file = output_for(settings.out, source_of(path))
        if settings.format:
            output, named = find_output(settings.format), output
            if is_file and output is not named:
                raise UserError(
                    f"--out {settings.out} has the ending of {named.name}, --format says {output.name}; change one."
                )
        if is_file and (settings.per_object or not alone):
            what = "--per-object writes several files" if settings.per_object else f"there are {len(inputs)} inputs"
            raise UserError(f"--out {settings.out} is one file, but {what}; give a folder.")
        targets.append(_Target(path, output, _place(settings, output, name, is_file, alone), settings.per_object))
    for number, target in enumerate(targets):
        _keep_inputs(target.path, target, inputs)
        if any(target.path == other.path for other in targets[:number]):
            raise UserError(f"{target.source}: two inputs would write {target.path}; predict them one after the other.")
        if not target.per_object:
            check_free(target.path, target.output, settings.force)
        elif target.path.is_file():
            raise UserError(f"{target.path} is a file, but --per-object writes a folder; choose another name.")
    return targets


def _keep_inputs(path: Path, target: _Target, inputs: Sequence[Path]) -> None:
    """Refuse to write over an input, also with --force.

    Raises:
        UserError: `path` is an input, or a folder of masks that would take the place of one that holds an input.
    """
    place, folder = path.resolve(), not (target.output.endings or target.per_object)
    for source in inputs:
        own = source.resolve()
        if (place == own and (folder or source.is_file())) or (folder and place in own.parents):
            raise UserError(f"{path}: masks would take the place of the input {source}; choose another --out.")


def _place(settings: PredictSettings, output: Output, name: str, is_file: bool, alone: bool) -> Path:
    if is_file or (alone and (settings.per_object or not output.endings)):
        return settings.out
    if settings.per_object or not output.endings:
        return settings.out / name
    return settings.out / (name + output.endings[0])


def _safe(name: str) -> str:
    """An object's name as a file's name."""
    kept = "".join(letter if letter.isalnum() or letter in "-_. " else "-" for letter in name).strip(" .")
    return kept or "object"


# -------------------------------------------------------------------------------------------------- one input


def _predict_one(
    target: _Target,
    inputs: Sequence[Path],
    said: PromptFile,
    predictor: Predictor,
    settings: PredictSettings,
    progress: Progress,
) -> Written:
    start = time.perf_counter()
    progress(f"reading {target.source.name}", 0, 0)
    scan = open_scan(target.source, settings.scan)
    prompted = onto_scan(said, scan)
    places = [target.of(name) for name in prompted.names]
    if target.per_object:
        if len(set(places)) < len(places):
            raise UserError(f"{target.source}: objects {', '.join(prompted.names)}: two would write one file; rename.")
        for place in places:
            _keep_inputs(place, replace(target, per_object=False), inputs)
            check_free(place, target.output, settings.force)
    shape = (len(scan.frames), scan.height, scan.width)
    with open_spool(shape, prompted.values, target.per_object) as spool:
        results = list(_results(spool, scan, prompted, places))
        for _, masks in results:
            target.output.check(masks)
        _fill(spool, scan, prompted, predictor, settings.direction, progress)
        progress(f"writing {target.path.name}", shape[0], shape[0])
        for place, masks in results:
            write_masks(target.output, place, masks, settings.force)
        counts = tuple(spool.counts.tolist())
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


def _fill(
    spool: Spool, scan: Scan, prompted: Prompted, predictor: Predictor, direction: Direction, progress: Progress
) -> None:
    """Predict every frame into the spool."""
    done = 0
    what = f"predicting {scan.path.name}"
    progress(what, 0, len(scan.frames))
    for result in predictor.stream(scan.frames, prompted.prompts, direction):
        done += spool.add(result)
        progress(what, done, len(scan.frames))


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
