"""Our predictor on one clip, as one line of JSON. `predict.py` runs it in a separate process."""

from __future__ import annotations

import json

import predict_work


def main() -> None:
    work = predict_work.given()
    import torch

    from medsam2.inference import features
    from medsam2.inference.predictor import FramePrompt, Predictor
    from medsam2.model.build import ModelSpec, load_model
    from medsam2.model.tracker import Tracker

    idle = predict_work.peak_mb()
    tracker = Tracker(load_model(work.weights, ModelSpec("hiera_tiny", image_size=work.side)).sam.to(work.device))
    predictor = Predictor(tracker.eval(), autocast=torch.bfloat16 if work.half else None)
    frames, boxes = predict_work.clip(work)
    prompts = [FramePrompt(work.middle, n, box=box) for n, box in enumerate(boxes)]
    if work.count:
        # Encode all frames in one batch, as on a GPU, instead of one by one.
        features.MAX_CPU_BATCH_PIXELS = work.frames * work.side**2
        stream = predictor.stream(frames, prompts, "forward")
        for _ in range(work.middle, work.frames - 1):
            next(stream)
        with torch.backends.mkldnn.flags(enabled=False):  # the code path of a GPU
            print(json.dumps({"operators": sum(predict_work.count_operators(lambda: next(stream)).values())}))
        return
    predict_work.measure(work, idle, lambda: predictor.predict(frames, prompts, "both").masks)


if __name__ == "__main__":
    main()
