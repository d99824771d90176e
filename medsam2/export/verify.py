"""What an export is checked on, and how far two sets of masks are apart (`expected` has what is asked of a consumer).

Legend: N objects, T frames, C channels, H and W pixels of the clip.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medsam2.config import untouched_hydra
from medsam2.errors import UserError, did_you_mean
from medsam2.evaluation.predictor import FramePrompt
from medsam2.model.build import import_sam2
from medsam2.prompts.strategies import select_frames, tight_box

if TYPE_CHECKING:
    from sam2.sam2_video_predictor import SAM2VideoPredictor

AGREEMENT = 0.999  # masks must overlap at least so much: IoU over all frames of all objects
ABSENT = -512.0  # logits below it mean "object absent" (-1024 in the network's code)


@dataclass(frozen=True, eq=False)
class ReferenceClip:
    """What both predictors are run on.

    frames: uint8 [T, C, H, W], C = 1 or 3. prompts: one a object, all on the same frame. name: for the report.
    """

    frames: Tensor
    prompts: tuple[FramePrompt, ...]
    name: str


@dataclass(frozen=True)
class Verification:
    """How far the consumer's output is from ours, on all frames of all objects of a clip.

    Attributes:
        max_logit_difference: largest absolute difference of mask logits where both say that the object is present.
        max_score_difference: likewise of the object scores (logits), on all frames.
        compared: share of the mask logits that were compared: of frames on which both see the object.
        iou: intersection over union of the two sets of mask pixels (1 if both are empty).
        foreground: share of pixels in our masks; 0 would prove little.
    """

    clip: str
    frames: int
    objects: int
    max_logit_difference: float
    max_score_difference: float
    compared: float
    iou: float
    foreground: float
    loaded: str = "strictly, by sam2.build_sam.build_sam2_video_predictor"
    passed: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(ours: Tensor, theirs: Tensor, scores: Tensor, their_scores: Tensor, clip: ReferenceClip) -> Verification:
    """Differences of two sets of logits [N, T, H, W] and of object scores [N, T]; passed is False where any is NaN."""
    both = (ours > ABSENT) & (theirs > ABSENT)
    mine, other = ours > 0, theirs > 0
    union = int((mine | other).sum())
    iou = int((mine & other).sum()) / union if union else 1.0
    score_difference = float((scores - their_scores).abs().max())
    return Verification(
        clip=clip.name,
        frames=ours.shape[1],
        objects=ours.shape[0],
        max_logit_difference=float((ours - theirs)[both].abs().max()) if both.any() else 0.0,
        max_score_difference=score_difference,
        compared=float(both.float().mean()),
        iou=iou,
        foreground=float(mine.float().mean()),
        passed=iou >= AGREEMENT and math.isfinite(score_difference),
    )


def load_official(config: Path, checkpoint: Path) -> SAM2VideoPredictor:
    """Meta's video predictor with its default post-processing, but for the filling of holes (it needs CUDA code).

    Raises:
        UserError: a key is missing or too many, or the yaml does not compose.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    build = import_sam2("sam2.build_sam").build_sam2_video_predictor
    with untouched_hydra():
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(config.parent.resolve()), version_base="1.2"):
            try:
                predictor: SAM2VideoPredictor = build(config.name, str(checkpoint), device="cpu")
            except Exception as error:  # whatever goes wrong there, the files are not what they should be
                raise UserError(f"the official code does not load {checkpoint.name}: {error}") from error
    predictor.fill_hole_area = 0
    return predictor


# ---------------------------------------------------------------------------------------------------- clips


def generated_clip(side: int = 160, length: int = 10) -> ReferenceClip:
    """Two blobs that move over noise, one bright and one dark, both boxed on the middle frame."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    frames = np.repeat(generator.normal(100, 12, (1, side, side)), length, 0)
    prompt_frame, prompts = length // 2, []
    for index, (column, row, radius, change) in enumerate([(0.3, 0.4, 0.15, 70), (0.7, 0.55, 0.12, -60)]):
        for t in range(length):
            inside = (x - column - 0.008 * t) ** 2 + (y - row + 0.006 * t) ** 2 < radius**2
            frames[t][inside] += change
            if t == prompt_frame:
                prompts.append(FramePrompt(t, index, box=tight_box(inside)))
    values = torch.from_numpy(frames.clip(0, 255).astype(np.uint8))[:, None]
    return ReferenceClip(values, tuple(prompts), f"a generated clip of {length} frames")


def clip_of_case(case: str) -> ReferenceClip:
    """The first held-out segment of a shard folder ("SHARDS"), or the one with a given key ("SHARDS:KEY").

    Its largest object gets a tight box on the slice where it is largest.

    Raises:
        UserError: no such folder or key, or a segment without objects.
    """
    from medsam2.data.catalog import Catalog
    from medsam2.data.reader import BatchReader
    from medsam2.data.stream import PlanEntry

    folder, _, key = case.partition(":")
    catalog = Catalog(folder)
    keys = [catalog.text("key", row) for row in range(len(catalog))]
    if key and key not in keys:
        raise UserError(f"--case: {folder} has no segment {key!r}.{did_you_mean(key, keys)}")
    held_out = [row for row in range(len(catalog)) if catalog.text("split", row) != "train"]
    row = keys.index(key) if key else (held_out or [0])[0]
    sizes = catalog.objects(row).pixels.max(1, initial=0)
    if not sizes.size or not sizes.max():
        raise UserError(f"--case: the segment {keys[row]} of {folder} has no object; name another one (SHARDS:KEY).")
    frames = tuple(range(catalog.num_frames(row)))
    entry = PlanEntry(0, row, frames, (int(sizes.argmax()),), seed=0, position=0)
    read = BatchReader([catalog], None).read([entry], 0)
    mask = read.masks[0].numpy()
    frame = select_frames(mask, "largest")[0]
    prompt = FramePrompt(frame, 0, box=tight_box(mask[frame]))
    return ReferenceClip(read.frames[0], (prompt,), f"{keys[row]} ({read.names[0]})")
