"""A user of Meta's code: loads an official export and runs what is asked of it, without medsam2.

    python official_consumer.py CONFIG.yaml WEIGHTS.pt [ADAPTER] REQUEST.npz ANSWER.npz

It is started as a file of its own by `verify`, with the options that `build_sam2_video_predictor` and `build_sam2` have
by default, but for the filling of holes (it needs compiled CUDA code).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from sam2.build_sam import build_sam2, build_sam2_video_predictor
from sam2.sam2_image_predictor import SAM2ImagePredictor


def load(build: Any, config: str, weights: str, adapter: str | None = None) -> Any:
    """A model of the self-contained yaml, strictly loaded; an adapter of peft's is merged into it."""
    GlobalHydra.instance().clear()  # importing sam2 initialises it for the package's own files
    with hydra.initialize_config_dir(str(Path(config).parent), version_base="1.2"):
        model = build(Path(config).name, weights, device="cpu")
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def follow(model: Any, images: torch.Tensor, size: tuple[int, int], prompts: list[Any], masks: Any) -> list[Any]:
    """Logits [N, T, H, W] and object scores [N, T], propagated both ways from the prompts.

    The predictor reads JPEG folders and MP4 only: it is given one black JPEG, then the very frames [T, 3, S, S].
    """
    length, objects = len(images), len({prompt["object"] for prompt in prompts})
    logits = np.full((objects, length, *size), -1024.0, np.float32)
    scores = np.full((objects, length), np.nan, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", size[::-1]).save(Path(folder) / "00000.jpg")
        state = model.init_state(folder)
    state.update(images=images, num_frames=length, cached_features={})
    for prompt in prompts:
        frame, number = prompt["frame"], prompt["object"]
        if "mask" in prompt:
            model.add_new_mask(state, frame, number, masks[prompt["mask"]])
        else:
            said = {key: prompt.get(key) for key in ("points", "labels", "box")}
            model.add_new_points_or_box(state, frame, number, **said)
    for reverse in (False, True):
        for frame, _, values in model.propagate_in_video(state, reverse=reverse):
            logits[:, frame] = values[:, 0].float().numpy()
    for index, outputs in state["output_dict_per_obj"].items():
        for kind in ("cond_frame_outputs", "non_cond_frame_outputs"):
            for frame, output in outputs[kind].items():
                scores[index, frame] = float(output["object_score_logits"])
    return [logits, scores]


def segment(predictor: Any, image: torch.Tensor, inputs: dict[str, Any]) -> list[Any]:
    """Low-resolution logits and predicted IoUs of one picture [3, S, S], as the image predictor chooses them."""
    side = image.shape[-1]
    if side != 1024:  # the package hard-codes the sizes of 1024 px
        predictor._bb_feat_sizes = [(side // 4,) * 2, (side // 8,) * 2, (side // 16,) * 2]
    predictor.set_image(np.zeros((side, side, 3), np.uint8))  # sets sizes; the very picture comes next
    features = predictor.model.forward_image(image[None])
    _, flat, _, _ = predictor.model._prepare_backbone_features(features)
    flat[-1] = flat[-1] + predictor.model.no_mem_embed
    maps = [
        value.permute(1, 2, 0).view(1, -1, *size)
        for value, size in zip(flat[::-1], predictor._bb_feat_sizes[::-1], strict=True)
    ][::-1]
    predictor._features = {"image_embed": maps[-1], "high_res_feats": maps[:-1]}
    labels = inputs["point_labels"]
    boxed = labels.shape[1] == 2 and (labels[0] == [2, 3]).all()
    prompts: dict[str, Any] = {"box": inputs["point_coords"].reshape(len(labels), -1)}
    if not boxed:
        prompts = {"point_coords": inputs["point_coords"][0], "point_labels": labels[0].astype(int)}
    if inputs["has_mask_input"].any():
        prompts["mask_input"] = inputs["mask_input"][0]
    _, ious, low = predictor.predict(**prompts, multimask_output=not boxed, return_logits=True)
    return [low.reshape(len(labels), -1, *low.shape[-2:]), ious.reshape(len(labels), -1)]


@torch.inference_mode()
def main(*arguments: str) -> None:
    """Answer every item of the request: `NUMBER.logits` and `NUMBER.scores`."""
    *files, request, answer = arguments
    with np.load(request, allow_pickle=False) as file:
        given = dict(file)
    items = json.loads(bytes(given["items"]).decode())
    images, size = torch.from_numpy(given["images"]), tuple(int(value) for value in given["size"])
    video: Any = None
    picture: Any = None
    answers: dict[str, np.ndarray] = {}
    for number, item in enumerate(items):
        inputs = {name: given[f"{number}.{name}"] for name in item["inputs"]}
        first, stop = item["frames"]
        if item["kind"] == "clip":
            if video is None:
                video = load(build_sam2_video_predictor, *files)
                video.fill_hole_area = 0
            found = follow(video, images[first:stop], (size[0], size[1]), item["prompts"], inputs)
        else:
            video = None  # one model at a time in memory
            picture = picture or SAM2ImagePredictor(load(build_sam2, *files))
            found = segment(picture, images[first], inputs)
        answers |= {f"{number}.logits": found[0], f"{number}.scores": found[1]}
    if any(name.split(".")[0] == "medsam2" for name in sys.modules):
        sys.exit("medsam2 was imported: a user of Meta's code does not have it")
    np.savez(answer, **answers)  # type: ignore[arg-type]  # its stub takes the names for options


if __name__ == "__main__":
    main(*sys.argv[1:])
