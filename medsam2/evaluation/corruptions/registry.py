"""Which corruptions exist, and the one function that applies them.

To add a family, add one file here with `CORRUPTIONS: tuple[Corruption, ...]`. A corruption is planned for a whole case
(what its frames share is drawn once) and then computed frame by frame, so that memory does not grow with the case.
"""

from __future__ import annotations

import importlib
import pkgutil
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from medsam2.errors import UserError, did_you_mean
from medsam2.evaluation.corruptions.scene import Corruption, Scene

if TYPE_CHECKING:
    from medsam2.evaluation.sources import LoadedCase

SEVERITIES = (1, 2, 3, 4, 5)
# In the order of tables and pictures
FAMILIES = ("noise", "blur", "weather", "digital", "surgical", "scan", "ct", "mr", "ultrasound")
SUITES = ("imagenet_c", "surgical", "medical")


@cache
def registry() -> dict[str, Corruption]:
    """Every corruption by name, in the order of `FAMILIES`; a family that is not listed there comes last.

    Raises:
        RuntimeError: two corruptions claim one name.
    """
    files = [entry.name for entry in pkgutil.iter_modules([str(Path(__file__).parent)])]
    others = sorted(name for name in files if name not in FAMILIES and name not in ("registry", "settings"))
    found: dict[str, Corruption] = {}
    for file in (*FAMILIES, *others):
        module = importlib.import_module(f"{__package__}.{file}")
        for corruption in getattr(module, "CORRUPTIONS", ()):
            if corruption.name in found:
                raise RuntimeError(f"two corruptions are named {corruption.name!r}; the second is in {module.__name__}")
            found[corruption.name] = corruption
    return found


def names(modality: str, kind: str) -> list[str]:
    """The corruptions that make sense for a modality (as in `Case`) and kind (volume, clip or still)."""
    return [name for name, corruption in registry().items() if corruption.fits(modality, kind)]


def corrupt(case: LoadedCase, name: str, severity: int, seed: int = 0) -> LoadedCase:
    """The case with other `frames`; a function of (seed, data set and case, name, severity) alone.

    Raises:
        UserError: no such corruption or severity, or one that makes no sense for the case's modality and kind.
    """
    known = registry()
    if name not in known:
        raise UserError(f"corruption {name!r}: there are {', '.join(known)}.{did_you_mean(name, known)}")
    if severity not in SEVERITIES:
        raise UserError(f"severity {severity!r} of {name}: give one of {', '.join(map(str, SEVERITIES))}.")
    if not known[name].fits(case.modality, case.kind):
        sensible = ", ".join(names(case.modality, case.kind))
        raise UserError(f"corruption {name!r} is not for a {case.kind} of {case.modality}; these are: {sensible}.")
    frames = np.ascontiguousarray(case.frames.permute(0, 2, 3, 1).numpy())
    text = f"{case.dataset}/{case.case}"
    key = (seed, zlib.crc32(text.encode()), zlib.crc32(name.encode()))
    scene = Scene(frames, case.planes, case.spacing, case.kind, case.modality, key)
    apply = known[name].plan(scene, severity)
    damaged = np.empty_like(frames)
    for t in range(scene.length):
        values = np.asarray(apply(t, scene.frame(t)), np.float32).reshape(frames.shape[1:])
        damaged[t] = np.clip(np.rint(values * 255.0), 0, 255).astype(np.uint8)
    return replace(case, frames=torch.from_numpy(damaged).permute(0, 3, 1, 2).contiguous())
