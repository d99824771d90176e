"""Which corruptions exist, what one sees of a case, and the one function that applies them.

To add a corruption, write a function with `@corruption` above it in a file of its modality. A corruption is planned for
a whole case (what its frames share is drawn once) and then computed frame by frame, so that memory does not grow with
the case.

Legend: T frames, H and W pixels, C channels (1 or 3).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from medsam2.errors import check_choice
from medsam2.plugins import register

if TYPE_CHECKING:
    from medsam2.evaluation.loaded_case import LoadedCase

SEVERITIES: tuple[Literal[1, 2, 3, 4, 5], ...] = (1, 2, 3, 4, 5)
SUITES = ("imagenet_c", "surgical", "medical")
REFERENCE_SIDE_PX = 224
"""Side of the pictures that ImageNet-C's lengths are made for."""

FrameFunction = Callable[[int, np.ndarray], np.ndarray]
"""(t, frame float32 [H, W, C] in 0..1) -> frame of the same shape; values beyond 0..1 are clipped by the caller."""


class Scene:
    """One case, as a corruption sees it.

    Attributes:
        frames: uint8 [T, H, W, C]. planes: integer label planes [P, T, H, W].
        key: whole numbers (seed, case, corruption) that all random numbers come from. The severity is not among them:
            the smoke of severity 5 is that of severity 1, only denser, so that luck does not bend a curve over the
            severities.
        length, height, width: T, H, W. side: the shorter of H and W.
        scale: pixels of this case per pixel of a picture of 224: lengths are shares of the shorter side.
    """

    def __init__(self, frames: np.ndarray, planes: np.ndarray, key: tuple[int, ...]) -> None:
        self.frames, self.planes, self.key = frames, planes, key
        self.length, self.height, self.width = map(int, frames.shape[:3])
        self.side = min(self.height, self.width)
        self.scale = self.side / REFERENCE_SIDE_PX

    def shared(self, stream: str = "") -> np.random.Generator:
        """Random numbers that belong to the whole case."""
        return np.random.default_rng([*self.key, zlib.crc32(stream.encode())])

    def own(self, t: int) -> np.random.Generator:
        """Random numbers that belong to frame `t` alone, whatever other frames were computed before."""
        return np.random.default_rng([*self.key, zlib.crc32(b""), t + 1])

    def frame(self, t: int) -> np.ndarray:
        """float32 [H, W, C] in 0..1 of the clean case."""
        return self.frames[t].astype(np.float32) / 255.0


@dataclass(frozen=True)
class Corruption:
    """One kind of damage.

    Attributes:
        name: unique. suite: one of `SUITES`.
        make: (scene, level) -> the function of a frame; `make` draws what the frames of a case share.
        levels: the parameters of the five severities.
        modalities, kinds: where it makes sense; empty for everywhere.
    """

    name: str
    suite: str
    make: Callable[[Scene, Any], FrameFunction]
    levels: tuple[Any, ...]
    modalities: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def plan(self, scene: Scene, severity: int) -> FrameFunction:
        """The function of a frame at a severity of 1 to 5."""
        return self.make(scene, self.levels[severity - 1])

    def fits(self, modality: str, kind: str) -> bool:
        """Whether it makes sense for such a case."""
        return (not self.modalities or modality in self.modalities) and (not self.kinds or kind in self.kinds)


CORRUPTIONS: dict[str, Corruption] = {}
"""Every corruption by name, in the order of tables and pictures; the modules beside this one fill it."""
Maker = Callable[[Scene, Any], FrameFunction]


def corruption(
    suite: str, levels: tuple[Any, ...], modalities: tuple[str, ...] = (), kinds: tuple[str, ...] = ()
) -> Callable[[Maker], Maker]:
    """Register a function as a corruption under its own name; see `Corruption`.

    Raises:
        RuntimeError: the name is taken.
    """

    def enter(make: Maker) -> Maker:
        entry = Corruption(make.__name__, suite, make, levels, modalities, kinds)
        return register(CORRUPTIONS, make.__name__, entry, "corruptions").make

    return enter


def names(modality: str, kind: str) -> list[str]:
    """The corruptions that make sense for a modality (as in `Case`) and kind (volume, clip or still)."""
    return [name for name, entry in CORRUPTIONS.items() if entry.fits(modality, kind)]


def corrupt(case: LoadedCase, name: str, severity: int, seed: int = 0) -> LoadedCase:
    """The case with damaged `frames`; a function of (seed, content of the case, name, severity) alone."""
    frames = np.ascontiguousarray(case.frames.permute(0, 2, 3, 1).numpy())
    key = (seed, zlib.crc32(case.content_hash.encode()), zlib.crc32(name.encode()))
    scene = Scene(frames, case.planes, key)
    apply = CORRUPTIONS[name].plan(scene, severity)
    damaged = np.empty_like(frames)
    for t in range(scene.length):
        values = np.asarray(apply(t, scene.frame(t)), np.float32).reshape(frames.shape[1:])
        damaged[t] = np.clip(np.rint(values * 255.0), 0, 255).astype(np.uint8)
    return replace(case, frames=torch.from_numpy(damaged).permute(0, 3, 1, 2).contiguous())


class CorruptionSettings(BaseModel):
    """Corruptions by name, and how severe: see configs/corruption/.

    Attributes:
        names: what is tried on the cases that it makes sense for (`applicable`); empty for no robustness run.
        severities: of 1 to 5, ascending.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...] = ()
    severities: Annotated[
        tuple[Literal[1, 2, 3, 4, 5], ...], Field(min_length=1), AfterValidator(lambda v: tuple(sorted(set(v))))
    ] = SEVERITIES

    @field_validator("names")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            check_choice("corruption", name, CORRUPTIONS)
        if len(set(value)) < len(value):
            raise ValueError(f"a corruption is named twice in {', '.join(value)}; name each once")
        return value

    def applicable(self, modality: str, kind: str) -> tuple[str, ...]:
        """Those of `names` that make sense for a case of this modality and kind, in the order given."""
        sensible = names(modality, kind)
        return tuple(name for name in self.names if name in sensible)
