"""The `augment` group of the configuration, validated."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from medsam2.data.settings import Probability, Strict

FOLDS_ABOVE = 0.25  # displacement over the distance of two control points


class Jitter(Strict):
    """Something done to a clip with `probability`, its strength uniform in `range` (low, high)."""

    probability: Probability = 0.0
    range: tuple[float, float] = (0.0, 0.0)

    @model_validator(mode="after")
    def _ordered(self) -> Jitter:
        if self.range[0] > self.range[1]:
            raise ValueError(f"range {self.range} has its low end above its high end")
        return self


class Elastic(Jitter):
    """A smooth deformation: `range` is the displacement as a share of the side, `points` control points each way.

    Fewer points make it smoother. Displacements that would fold the image over itself are refused.
    """

    points: int = Field(default=5, ge=3, le=16)

    @model_validator(mode="after")
    def _without_folds(self) -> Elastic:
        most = FOLDS_ABOVE / (self.points - 1)
        if not 0.0 <= self.range[0] <= self.range[1] <= most:
            raise ValueError(
                f"range {self.range} must lie within 0 and {most:.3f} for {self.points} points, or the image folds; "
                "take smaller displacements or fewer points"
            )
        return self


class Affine(Strict):
    """Rotation and shear in degrees (each uniform in +-), scale (low, high), translation as a share of the side."""

    probability: Probability = 0.0
    rotation: float = Field(default=0.0, ge=0.0, le=180.0)
    shear: float = Field(default=0.0, ge=0.0, lt=80.0)
    scale: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]] = (1.0, 1.0)
    translate: float = Field(default=0.0, ge=0.0, le=1.0)


class AugmentSettings(Strict):
    """What is done to clips on the device, one set of parameters a clip (`frame` alone differs by frame).

    Attributes:
        flip_horizontal, flip_vertical: probabilities.
        affine: one rotation, shear, scale and translation of the clip.
        crop: zoom on an object; range is the crop's side over the object's side, e.g. (1.5, 4).
        elastic: a smooth deformation, the same on all frames of the clip.
        gamma: exponent, in 0..1 grey values. contrast: factor around the clip's mean. brightness: added, 0..1.
        noise: standard deviation of Gaussian noise, 0..1. blur: sigma in model pixels.
        low_resolution: side over model side, e.g. (0.4, 0.9): reduced and enlarged again.
        greyscale, channel_dropout: probabilities, colour clips only.
        frame: brightness and contrast that differ a little from frame to frame; range is the strength.
        min_pixels: model pixels below which an object is taken as pushed out of its frame.
    """

    flip_horizontal: Probability = 0.0
    flip_vertical: Probability = 0.0
    affine: Affine = Affine()
    crop: Jitter = Jitter()
    elastic: Elastic = Elastic()
    gamma: Jitter = Jitter()
    contrast: Jitter = Jitter()
    brightness: Jitter = Jitter()
    noise: Jitter = Jitter()
    blur: Jitter = Jitter()
    low_resolution: Jitter = Jitter()
    greyscale: Probability = 0.0
    channel_dropout: Probability = 0.0
    frame: Jitter = Jitter()
    min_pixels: int = Field(default=4, ge=1)
