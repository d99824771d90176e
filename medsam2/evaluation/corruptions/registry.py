"""The registry of corruptions, their input, and `corrupt`, which applies one to a case.

To add a corruption, write a function with `@corruption` above it in the file of its modality. The function draws once
what all frames of a case share and returns a function that is then called per frame, so memory does not grow with the
case.

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
"""Image side to which ImageNet-C's lengths refer."""

FrameFunction = Callable[[int, np.ndarray], np.ndarray]
"""(t, frame float32 [H, W, C] in 0..1) -> frame of the same shape; the caller clips values to 0..1."""


class Scene:
    """The input of a corruption: the frames and labels of one case, and its random generators.

    Attributes:
        frames: uint8 [T, H, W, C]. planes: integer label planes [P, T, H, W].
        key: integers (seed, case, corruption) that seed all random numbers. The severity is not among them: severity 5
            has the smoke of severity 1, only denser, so chance does not distort a curve over the severities.
        length, height, width: T, H, W. side: the shorter of H and W.
        scale: `side` / 224, which converts ImageNet-C's lengths to pixels of this case.
    """

    def __init__(self, frames: np.ndarray, planes: np.ndarray, key: tuple[int, ...]) -> None:
        self.frames, self.planes, self.key = frames, planes, key
        self.length, self.height, self.width = map(int, frames.shape[:3])
        self.side = min(self.height, self.width)
        self.scale = self.side / REFERENCE_SIDE_PX

    def case_rng(self, stream: str = "") -> np.random.Generator:
        """The generator of what all frames of the case share."""
        return np.random.default_rng([*self.key, zlib.crc32(stream.encode())])

    def frame_rng(self, t: int) -> np.random.Generator:
        """The generator of frame `t`, independent of which frames were computed before."""
        return np.random.default_rng([*self.key, zlib.crc32(b""), t + 1])

    def frame(self, t: int) -> np.ndarray:
        """Frame `t` of the clean case, float32 [H, W, C] in 0..1."""
        return self.frames[t].astype(np.float32) / 255.0


@dataclass(frozen=True)
class Corruption:
    """One kind of image corruption.

    Attributes:
        name: unique. suite: one of `SUITES`.
        make: (scene, level) -> frame function; `make` draws what the frames of a case share.
        levels: the parameters of the five severities.
        modalities, kinds: the cases that it applies to; empty for all.
    """

    name: str
    suite: str
    make: Callable[[Scene, Any], FrameFunction]
    levels: tuple[Any, ...]
    modalities: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def plan(self, scene: Scene, severity: int) -> FrameFunction:
        """Make the frame function for a severity of 1 to 5."""
        return self.make(scene, self.levels[severity - 1])

    def applies_to(self, modality: str, kind: str) -> bool:
        """Whether it applies to cases of this modality and kind."""
        return (not self.modalities or modality in self.modalities) and (not self.kinds or kind in self.kinds)


CORRUPTIONS: dict[str, Corruption] = {}
"""Every corruption by name, in the order of tables and pictures; the modules of this package register them."""
Maker = Callable[[Scene, Any], FrameFunction]


def corruption(
    suite: str, levels: tuple[Any, ...], modalities: tuple[str, ...] = (), kinds: tuple[str, ...] = ()
) -> Callable[[Maker], Maker]:
    """Register a function as a corruption under its own name; see `Corruption`.

    Raises:
        RuntimeError: the name is taken.
    """

    def decorate(make: Maker) -> Maker:
        entry = Corruption(make.__name__, suite, make, levels, modalities, kinds)
        return register(CORRUPTIONS, make.__name__, entry, "corruptions").make

    return decorate


def corrupt(case: LoadedCase, name: str, severity: int, seed: int = 0) -> LoadedCase:
    """Return the case with corrupted `frames`, determined by (seed, content of the case, name, severity)."""
    frames = np.ascontiguousarray(case.frames.permute(0, 2, 3, 1).numpy())
    key = (seed, zlib.crc32(case.content_hash.encode()), zlib.crc32(name.encode()))
    scene = Scene(frames, case.planes, key)
    apply = CORRUPTIONS[name].plan(scene, severity)
    corrupted = np.empty_like(frames)
    for t in range(scene.length):
        values = np.asarray(apply(t, scene.frame(t)), np.float32).reshape(frames.shape[1:])
        corrupted[t] = np.clip(np.rint(values * 255.0), 0, 255).astype(np.uint8)
    return replace(case, frames=torch.from_numpy(corrupted).permute(0, 3, 1, 2).contiguous())


class CorruptionSettings(BaseModel):
    """The corruptions of a robustness run: see configs/corruption/.

    Attributes:
        names: corruptions, each used on the cases that it applies to (`applicable`); empty for no robustness run.
        severities: from 1 to 5, ascending.
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
        """Those of `names` that apply to a case of this modality and kind, in the order of `names`."""
        return tuple(name for name in self.names if CORRUPTIONS[name].applies_to(modality, kind))
