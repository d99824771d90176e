"""The official video predictor on one clip, as one line of JSON. `predict.py` runs it in a separate process.

`SAM2VideoPredictor` of the `sam2` package has its default post-processing, except for the filling of holes. It can only
read JPEG folders, so it first gets a black image; its frames are then replaced by ours, so that both use equal pixels.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import predict_work

STABILITY = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}


def main() -> None:
    work = predict_work.given()
    import torch

    from medsam2.model.build import VIDEO_PREDICTOR, ModelSpec, build_sam, import_sam2
    from medsam2.pixels import normalise

    import_sam2("sam2.sam2_video_predictor").tqdm = lambda order, **_: order
    idle = predict_work.peak_mb()
    overrides = {"fill_hole_area": 0, "binarize_mask_from_pts_for_mem_enc": True}
    spec = ModelSpec("hiera_tiny", image_size=work.side)
    model: Any = build_sam(spec, target=VIDEO_PREDICTOR, overrides=overrides).to(work.device).eval()
    model.load_state_dict(torch.load(work.weights, weights_only=True)["model"], strict=True)
    for name, value in STABILITY.items():
        setattr(model.sam_mask_decoder, name, value)
    frames, boxes = predict_work.clip(work)
    with tempfile.TemporaryDirectory(prefix="medsam2-predict-") as folder:
        _black(Path(folder), work.side)

        def begin(objects: list[int]) -> Any:
            state = model.init_state(folder)
            state["images"] = normalise(frames.to(work.device), work.side)
            state["num_frames"], state["cached_features"] = work.frames, {}
            for n in objects:
                model.add_new_points_or_box(state, work.middle, n, box=boxes[n])
            return state

        if work.count:
            _count(work, model, begin(list(range(work.objects))))
            return
        flow = _lesions if work.lesions else _video
        with torch.autocast(work.device, torch.bfloat16, enabled=work.half):
            predict_work.measure(work, idle, lambda: flow(work, model, begin))


def _video(work: predict_work.Work, model: Any, begin: Any) -> Any:
    """Predict all objects in one state, forward and then backward: bool [N, T, S, S]."""
    import torch

    masks = torch.zeros(work.objects, work.frames, work.side, work.side, dtype=torch.bool)
    state = begin(list(range(work.objects)))
    for reverse in (False, True):
        for frame, _, logits in model.propagate_in_video(state, reverse=reverse):
            masks[:, frame] = (logits[:, 0] > 0).cpu()
    return masks


def _lesions(work: predict_work.Work, model: Any, begin: Any) -> Any:
    """Predict with a new state for each object and direction: bool [N, T, S, S]."""
    import torch

    masks = torch.zeros(work.objects, work.frames, work.side, work.side, dtype=torch.bool)
    for n in range(work.objects):
        for reverse in (False, True):
            for frame, _, logits in model.propagate_in_video(begin([n]), reverse=reverse):
                masks[n, frame] = (logits[0, 0] > 0).cpu()
    return masks


def _count(work: predict_work.Work, model: Any, state: Any) -> None:
    """Count the operators of the last frame, without encoding."""
    stream = model.propagate_in_video(state)
    for _ in range(work.middle, work.frames - 1):
        next(stream)
    model._get_image_feature(state, work.frames - 1, 1)
    print(json.dumps({"operators": sum(predict_work.count_operators(lambda: next(stream)).values())}))


def _black(folder: Path, side: int) -> None:
    from PIL import Image

    Image.new("RGB", (side, side)).save(folder / "00000.jpg")


if __name__ == "__main__":
    main()
