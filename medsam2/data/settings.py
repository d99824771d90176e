"""The `data` group of the configuration, validated (`augment`: augment_settings.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from medsam2.data.cache_settings import CacheSettings
from medsam2.data.strict import Probability, Strict


class DataSettings(Strict):
    """What is trained on, and how clips are cut out of segments.

    Attributes:
        shards: one or several folders written by `medsam2 prepare`, mixed.
        split, val_split: the splits of the index that are trained on and validated on.
        clip_frames: frames of a clip (1 for stills).
        max_objects: the largest number of objects of one clip.
        clips_per_batch: clips a device takes at once; the global batch is this times ranks and accumulation.
        steps_per_epoch: an epoch is a number of optimiser steps.
        stride_max: neighbouring frames of a clip are 1..stride_max frames apart.
        reverse_probability: how often a clip runs backwards in time.
        absence_probability: how often a window is chosen in which the object is absent from some frame.
        prompt_first: "first": every chosen object is present in the first frame, which is prompted;
            "any": it is present in some frame of the clip.
        min_pixels: stored pixels that an object needs on the frame that makes it eligible.
        include, exclude: glob patterns of structure names; empty include means all.
        modalities: modalities to use; empty means all.
        mixture: pattern -> share. A pattern is a glob over data set names ("ct_*"), "folder:dataset" or
            modalities ("CT"); the first that matches counts, its share is split by `temperature`.
        temperature: weight of a data set of n segments is n ** temperature (1: by size, 0: all equal).
        name_balance: objects are drawn with weight (how often the name occurs) ** -name_balance.
        limit_cases: use only the first so many cases of each data set.
        limit_val: at most so many fixed validation clips, spread over the split; `ClipDataModule` alone uses it,
            train.py validates on whole cases (`validation.cases`).
        workers: processes that read ahead; 0 reads in the training process.
        max_lost_share: the run stops when more than this share of what was read is damaged.
        cache: of shards that lie behind a URL.
    """

    shards: tuple[Path, ...]
    split: str = "train"
    val_split: str = "val"
    clip_frames: int = Field(default=8, ge=1, le=64)
    max_objects: int = Field(default=3, ge=1)
    clips_per_batch: int = Field(default=8, ge=1)
    steps_per_epoch: int = Field(default=1000, ge=1)
    stride_max: int = Field(default=2, ge=1)
    reverse_probability: Probability = 0.5
    absence_probability: Probability = 0.25
    prompt_first: Literal["first", "any"] = "first"
    min_pixels: int = Field(default=16, ge=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    mixture: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    temperature: float = Field(default=0.5, ge=0.0, le=1.0)
    name_balance: Probability = 0.5
    limit_cases: int | None = Field(default=None, ge=1)
    limit_val: int = Field(default=64, ge=0)
    workers: int = Field(default=2, ge=0)
    max_lost_share: Probability = 0.05
    cache: CacheSettings = CacheSettings()

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("shards")
    @classmethod
    def _not_empty(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        if not value:
            raise ValueError("give at least one folder of shards")
        return value
