from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from medsam2.data.augment.augment import Augment
from medsam2.data.pictures import modality_clips
from medsam2.data.plan.plan import Plan
from medsam2.data.read.catalog import Catalog
from medsam2.data.settings import AugmentSettings, DataSettings


def test_a_modality_of_stills_is_drawn_beside_one_of_clips(
    tmp_path: Path, write_shards: Callable[..., Path], disks: Callable[..., Any]
) -> None:
    samples = [disks(seed, dataset="ct", modality="CT") for seed in range(3)]
    samples += [disks(seed, 1, dataset="chest", modality="XRAY") for seed in range(10, 13)]
    folder = write_shards(tmp_path / "mixed", samples)
    settings = DataSettings.model_validate({"shards": [folder], "stills": {"share": 0.5}, "workers": 0})
    plan, augment = Plan([Catalog(folder)], settings, 0, 1), Augment(AugmentSettings(), 64)
    for modality, shown in (("CT", 3), ("XRAY", 1)):
        clips = list(islice(modality_clips(plan, augment, modality), 5))
        assert [clip.frames.shape for clip in clips] == [(shown, 64, 64, 3)] * 5
        assert all(clip.names for clip in clips)


def test_frames_and_masks_of_a_clip_belong_together(
    tmp_path: Path, write_shards: Callable[..., Path], disks: Callable[..., Any]
) -> None:
    """The large disk is drawn bright in the image: inside its mask it is bright, outside dark."""
    folder = write_shards(tmp_path / "one", [disks(0)])
    settings = DataSettings.model_validate({"shards": [folder], "include": ["organ"]})
    plan = Plan([Catalog(folder)], settings, 0, 1)
    clip = next(modality_clips(plan, Augment(AugmentSettings(), 128), "CT"))
    assert clip.names == ("organ",)
    for frame, mask in zip(clip.frames.astype(int), clip.masks[0], strict=True):
        assert abs(np.median(frame[mask]) - 200) <= 1 and abs(np.median(frame[~mask]) - 40) <= 1
