"""The groups `data` and `augment` of the configuration, validated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """A group of settings: unknown keys are refused, values are not changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StillsSettings(Strict):
    """Batches of single frames between those of clips, as SAM 2 and SurgSAM-2 train on images and videos.

    Attributes:
        share: share of the steps that are batches of stills. 0: none; a segment of one frame is then a clip that
            shows it again and again.
        clips_per_batch: stills a device takes at once.
        max_objects: the largest number of objects of one still.
        from_clips: single frames of volumes and videos too, beside segments of one frame.
    """

    share: Probability = 0.0
    clips_per_batch: int = Field(default=32, ge=1)
    max_objects: int = Field(default=8, ge=1)
    from_clips: bool = False


class DataSettings(Strict):
    """What is trained on, and how clips are cut out of segments.

    Attributes:
        shards: one or several folders written by `medsam2 prepare`, or URLs of such (s3://, https://, ...), mixed.
        split: the split of the index that is trained on. val_split: the split that is validated on.
        clip_frames: frames of a clip (1 for stills).
        max_objects: the largest number of objects of one clip.
        clips_per_batch: clips a device takes at once; the global batch is this times ranks and accumulation.
        steps_per_epoch: length of an epoch in steps of the optimiser.
        stride_max: neighbouring frames of a clip are 1..stride_max apart, in frames of the segment.
        reverse_probability: how often a clip runs backwards in time.
        absence_probability: how often a window is chosen in which the object is absent from some frame.
        prompt_frame: which frame of a clip is prompted first, and shows all its objects. "first": the first, as in
            the recipes of SAM 2 and MedSAM2; "any": one drawn for each step, from which clips are tracked both ways.
        min_pixels: stored pixels that an object needs on the frame that is prompted.
        peak_min, peak_max: objects whose largest frame is smaller or larger are left out; in pixels as stored.
        include, exclude: glob patterns of structure names; empty include means all. "liver" is a name anywhere,
            "CT:liver" one in a modality, "msd_*:liver" one in datasets.
        modalities: modalities to use; empty means all.
        mixture: pattern -> share. A pattern is a glob over dataset names ("ct_*"), "folder:dataset" or
            modalities ("CT"); the first that matches counts, its share is split by `temperature`.
        temperature: weight of a dataset of n segments is n ** temperature (1: by size, 0: all equal).
        name_balance: a segment's objects are drawn with weight (how often the name occurs) ** -name_balance.
        limit_cases: use only the first so many cases of each dataset.
        stills: batches of single frames between those of clips.
        workers: processes that read ahead; 0 reads in the training process.
        max_lost_share: the run stops when more than this share of what was read is damaged.
    """

    shards: Annotated[tuple[str, ...], Field(min_length=1)]
    split: str = "train"
    val_split: str = "val"
    clip_frames: int = Field(default=8, ge=1, le=64)
    max_objects: int = Field(default=3, ge=1)
    clips_per_batch: int = Field(default=8, ge=1)
    steps_per_epoch: int = Field(default=1000, ge=1)
    stride_max: int = Field(default=2, ge=1)
    reverse_probability: Probability = 0.5
    absence_probability: Probability = 0.25
    prompt_frame: Literal["first", "any"] = "first"
    min_pixels: int = Field(default=16, ge=1)
    peak_min: int = Field(default=0, ge=0)
    peak_max: int | None = Field(default=None, ge=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    mixture: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    temperature: float = Field(default=0.5, ge=0.0, le=1.0)
    name_balance: Probability = 0.5
    limit_cases: int | None = Field(default=None, ge=1)
    stills: StillsSettings = StillsSettings()
    workers: int = Field(default=2, ge=0)
    max_lost_share: Probability = 0.05

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        values = (value,) if isinstance(value, str | Path) else value
        return tuple(map(os.fspath, values)) if isinstance(values, list | tuple) else values


class Jitter(Strict):
    """Something that is done to some clips.

    Attributes:
        probability: how often it is done.
        range: low and high end of its strength, which is drawn uniformly.
    """

    probability: Probability = 0.0
    range: tuple[float, float] = (0.0, 0.0)

    @model_validator(mode="after")
    def _ordered(self) -> Jitter:
        if self.range[0] > self.range[1]:
            raise ValueError(f"range {self.range} has its low end above its high end")
        return self


class Affine(Strict):
    """One rotation, shear, scale and translation of a clip.

    Attributes:
        probability: how often it is done.
        rotation, shear: largest angle, in degrees; drawn uniformly from both signs.
        scale: low and high end.
        translate: largest translation, as a share of the side.
    """

    probability: Probability = 0.0
    rotation: float = Field(default=0.0, ge=0.0, le=180.0)
    shear: float = Field(default=0.0, ge=0.0, lt=80.0)
    scale: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]] = (1.0, 1.0)
    translate: float = Field(default=0.0, ge=0.0, le=1.0)


class AugmentSettings(Strict):
    """What is done to clips on the device, one set of parameters a clip (`frame` alone differs by frame).

    Attributes:
        flip_horizontal, flip_vertical: how often a clip is mirrored.
        affine: one rotation, shear, scale and translation of the clip.
        crop: zoom on an object; range is the crop's side over the object's side, e.g. (1.5, 4).
        gamma: exponent, in 0..1 grey values. contrast: factor around the clip's mean. brightness: added, 0..1.
        noise: standard deviation of Gaussian noise, 0..1. blur: sigma in model pixels.
        low_resolution: side over model side, e.g. (0.4, 0.9): reduced and enlarged again.
        greyscale, channel_dropout: how often colour is removed, or a channel; colour clips only.
        frame: brightness and contrast that differ a little from frame to frame; range is the strength.
    """

    flip_horizontal: Probability = 0.0
    flip_vertical: Probability = 0.0
    affine: Affine = Affine()
    crop: Jitter = Jitter()
    gamma: Jitter = Jitter()
    contrast: Jitter = Jitter()
    brightness: Jitter = Jitter()
    noise: Jitter = Jitter()
    blur: Jitter = Jitter()
    low_resolution: Jitter = Jitter()
    greyscale: Probability = 0.0
    channel_dropout: Probability = 0.0
    frame: Jitter = Jitter()
