"""The groups `data` and `augment` of the configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """A group of settings that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StillsSettings(Strict):
    """Batches of single frames beside those of clips, as SAM 2 and SurgSAM-2 train on images and videos.

    Attributes:
        share: share of the steps that are batches of stills. 0: none; a segment of one frame is then a clip that
            repeats this frame.
        clips_per_batch: number of stills that a device processes at once.
        max_objects: largest number of objects per still.
        from_clips: whether stills are also taken from volumes and videos, not only from segments of one frame.
    """

    share: Probability = 0.0
    clips_per_batch: int = Field(default=32, ge=1)
    max_objects: int = Field(default=8, ge=1)
    from_clips: bool = False


class DataSettings(Strict):
    """The training data, and how clips are drawn from segments.

    Attributes:
        shards: one or more folders written by `medsam2 prepare`, or URLs of such folders (s3://, https://, ...).
        split: split of the index for training. val_split: split of the index for validation.
        clip_frames: number of frames per clip (1 for stills).
        max_objects: largest number of objects per clip.
        clips_per_batch: number of clips that a device processes at once; the global batch is this times ranks and
            accumulation.
        steps_per_epoch: length of an epoch, in steps of the optimiser.
        stride_max: neighbouring frames of a clip are 1 to stride_max apart, in frames of the segment.
        reverse_probability: probability that a clip runs backward in time.
        absence_probability: probability of choosing a clip in which the object is absent from some frame.
        prompt_frame: which frame of a clip is prompted first and shows all its objects. "first": the first, as in
            the recipes of SAM 2 and MedSAM2; "any": a random one per step, from which clips are tracked both ways.
        min_pixels: stored pixels that an object needs on the frame that is prompted.
        peak_min, peak_max: objects whose largest frame is smaller or larger are excluded; in pixels as stored.
        include, exclude: glob patterns of structure names; an empty include means all. "liver" is a name anywhere,
            "CT:liver" one in a modality, "msd_*:liver" one in datasets.
        modalities: modalities to use; empty means all.
        mixture: pattern -> share. A pattern is a glob over dataset names ("ct_*"), "folder:dataset" or
            modalities ("CT"). The first matching pattern applies; datasets with the same pattern divide its share by
            `temperature`.
        temperature: the weight of a dataset of n segments is n ** temperature (1: by size, 0: all equal).
        name_balance: a segment's objects are drawn with weight (frequency of the name) ** -name_balance.
        limit_cases: use only this many cases of each dataset, the first ones.
        stills: batches of single frames beside those of clips.
        workers: processes that read ahead; 0 reads in the training process.
        max_lost_share: the run stops if a larger share of the segments read is damaged.
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
    def _to_tuple(cls, value: object) -> object:
        values = (value,) if isinstance(value, str | Path) else value
        return tuple(map(os.fspath, values)) if isinstance(values, list | tuple) else values


class Jitter(Strict):
    """A random change of some clips.

    Attributes:
        probability: share of the clips that are changed.
        range: low and high end of the strength, which is drawn uniformly.
    """

    probability: Probability = 0.0
    range: tuple[float, float] = (0.0, 0.0)

    @model_validator(mode="after")
    def _check_order(self) -> Jitter:
        if self.range[0] > self.range[1]:
            raise ValueError(f"range {self.range} has its low end above its high end")
        return self


class Affine(Strict):
    """A random rotation, shear, scale and translation of a clip.

    Attributes:
        probability: share of the clips that are changed.
        rotation, shear: largest angle, in degrees, in both directions.
        scale: smallest and largest factor.
        translate: largest translation, as a share of the side.
    """

    probability: Probability = 0.0
    rotation: float = Field(default=0.0, ge=0.0, le=180.0)
    shear: float = Field(default=0.0, ge=0.0, lt=80.0)
    scale: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]] = (1.0, 1.0)
    translate: float = Field(default=0.0, ge=0.0, le=1.0)


class AugmentSettings(Strict):
    """Augmentation of clips on the device, with one set of parameters per clip (per frame for `frame`).

    Attributes:
        flip_horizontal, flip_vertical: probability of mirroring a clip.
        affine: rotation, shear, scale and translation.
        crop: zoom on an object; the strength is the crop's side over the object's side, e.g. (1.5, 4).
        gamma: exponent of grey values in 0..1. contrast: factor around the clip's mean. brightness: summand, 0..1.
        noise: standard deviation of Gaussian noise, 0..1. blur: sigma in model pixels.
        low_resolution: clips are reduced to this share of the model's side, e.g. (0.4, 0.9), and enlarged again.
        greyscale, channel_dropout: probability of removing all colour, or one channel; colour clips only.
        frame: strength of small changes of brightness and contrast from frame to frame.
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
