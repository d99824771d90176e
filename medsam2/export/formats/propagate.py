"""Follow objects through a volume or a video with the graphs of this folder. Needs numpy and onnxruntime, no PyTorch.

    python propagate.py FRAMES.npy PROMPTS.json MASKS.npz [--logits]

FRAMES.npy: uint8 [T, H, W] or [T, H, W, 3], windowed as in training. PROMPTS.json: a list of prompts, at least one for
each object, x and y in pixels of the frames:

    [{"object": 0, "frame": 5, "box": [x0, y0, x1, y1]},
     {"object": 1, "frame": 5, "points": [[x, y], [x, y]], "labels": [1, 0]},
     {"object": 2, "frame": 7, "mask": "mask.npy"}]

MASKS.npz: `masks` bool [objects, T, H, W], `scores` [objects, T] (above 0: the object is there).

A frame looks at its prompted frames, the six before it, and sixteen object pointers, first forward, then backward
(Ravi et al. 2024, arXiv 2408.00714). Memories are kept in float32, where PyTorch predictors keep bfloat16.

Beside `*.pt2` files instead of `*.onnx` the same script runs them with torch.export.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[..., list[np.ndarray]]
ABSENT = -1024.0


def stem(folder: Path) -> str:
    """How the files of a folder begin."""
    (settings,) = folder.glob("medsam2_*.json")
    return settings.stem


def onnx_graphs(folder: Path) -> Run:
    """`run(part, **inputs)` over the `*.onnx` files of `folder`, each loaded when it is first used."""
    import onnxruntime  # type: ignore[import-untyped]

    loaded: dict[str, Any] = {}

    def run(part: str, **inputs: np.ndarray) -> list[np.ndarray]:
        if part not in loaded:
            path = str(folder / f"{stem(folder)}_{part}.onnx")
            loaded[part] = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        found: list[np.ndarray] = loaded[part].run(None, inputs)
        return found

    return run


def torch_graphs(folder: Path) -> Run:
    """The same over `*.pt2` files."""
    import torch

    loaded: dict[str, Any] = {}

    @torch.no_grad()
    def run(part: str, **inputs: np.ndarray) -> list[np.ndarray]:
        if part not in loaded:
            loaded[part] = torch.export.load(str(folder / f"{stem(folder)}_{part}.pt2")).module()
        found = loaded[part](*(torch.from_numpy(np.ascontiguousarray(value)) for value in inputs.values()))
        return [value.numpy() for value in (found if isinstance(found, (tuple, list)) else [found])]

    return run


def graphs(folder: Path) -> Run:
    return onnx_graphs(folder) if any(folder.glob("*.onnx")) else torch_graphs(folder)


# --------------------------------------------------------------------------------------------------------- pixels


def weights(given: int, wanted: int, antialias: bool) -> np.ndarray:
    """Matrix [wanted, given] of a linear resampling; with `antialias`, wider where it shrinks (as PIL and PyTorch)."""
    scale = given / wanted
    reach = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(wanted) + 0.5) * scale - 0.5
    if not antialias:
        centres = centres.clip(0, given - 1)
    matrix = (1 - np.abs(np.arange(given)[None] - centres[:, None]) / reach).clip(0)
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def resize(values: np.ndarray, height: int, width: int, antialias: bool = True) -> np.ndarray:
    """[..., H, W] to [..., height, width]."""
    across = values.astype(np.float32) @ weights(values.shape[-1], width, antialias).T
    return np.asarray(weights(values.shape[-2], height, antialias) @ across, np.float32)


class Follower:
    """One clip, frames uint8 [T, H, W] or [T, H, W, 3]; `follow` takes one object through it.

    The features of the last `cache` frames are kept for the next object: 4 MB a frame at 512 px.
    """

    def __init__(self, run: Run, settings: dict[str, Any], frames: np.ndarray, cache: int = 64) -> None:
        self.run, self.say, self.frames, self.cache = run, settings, frames, cache
        self.length, self.size, self.side = len(frames), frames.shape[1:3], settings["image_size"]
        self.held: dict[int, list[np.ndarray]] = {}

    def features(self, frame: int) -> list[np.ndarray]:
        """high_res_feats_0, high_res_feats_1, image_embed of a frame."""
        if frame not in self.held:
            picture = self.frames[frame]
            channels = picture[None] if picture.ndim == 2 else np.moveaxis(picture, -1, 0)
            small = (resize(channels, self.side, self.side) / 255).clip(0, 1)
            mean, std = (np.asarray(self.say[key], np.float32)[:, None, None] for key in ("mean", "std"))
            image = ((np.broadcast_to(small, (3, self.side, self.side)) - mean) / std).astype(np.float32)
            while len(self.held) >= self.cache:
                self.held.pop(next(iter(self.held)))
            self.held[frame] = self.run("encoder", image=image[None])
        return self.held[frame]

    def decode(
        self,
        frame: int,
        embed: np.ndarray,
        points: np.ndarray,
        labels: np.ndarray,
        mask: np.ndarray | None = None,
        multimask: bool | None = None,
    ) -> dict[str, np.ndarray]:
        """Low-resolution logits [1, 1, S/4, S/4], object pointer [1, C] and score [1, 1] of one object."""
        fine, middle, _ = self.features(frame)
        empty = mask is None
        masks, ious, pointers, score = self.run(
            "tracker",
            image_embed=embed,
            high_res_feats_0=fine,
            high_res_feats_1=middle,
            point_coords=points[None].astype(np.float32),
            point_labels=labels[None].astype(np.float32),
            mask_input=np.zeros((1, 1, self.side // 4, self.side // 4), np.float32) if mask is None else mask,
            has_mask_input=np.asarray([0.0 if empty else 1.0], np.float32),
        )
        few, most = self.say["multimask_points"]
        several = few <= int((labels >= 0).sum()) <= most if multimask is None else multimask
        several = several and self.say["multimask_output_in_sam"]
        best = 1 + int(ious[0, 1:].argmax())
        chosen = best if several or not self.stable(masks[0, 0]) else 0
        token = best if several and self.say["use_multimask_token_for_obj_ptr"] else 0
        return {"logits": masks[:, [chosen]], "pointer": pointers[:, token], "score": score}

    def stable(self, logits: np.ndarray) -> bool:
        """Whether the single mask hardly changes with its threshold."""
        delta, least = self.say["stability"]
        outer = int((logits > -delta).sum())
        return not outer or bool(np.float32((logits > delta).sum()) / np.float32(outer) >= least)

    def prompted(self, prompt: dict[str, Any]) -> dict[str, np.ndarray]:
        """A frame as its prompt says."""
        frame = int(prompt["frame"])
        embed = self.features(frame)[2]
        nowhere = np.zeros((1, 2)), np.asarray([-1])
        if "mask" in prompt:
            mask = prompt["mask"]
            mask = np.load(mask, allow_pickle=False) if isinstance(mask, str) else mask
            square = (resize(np.asarray(mask, bool), self.side, self.side) >= 0.5).astype(np.float32)
            if not square.any():
                raise SystemExit(f"the mask of object {prompt['object']} on frame {frame} is empty")
            blocks = square.reshape(self.side // 4, 4, self.side // 4, 4).transpose(0, 2, 1, 3)
            kernel = np.asarray(self.say["mask_downsample"]["weight"], np.float32)
            dense = (blocks * kernel).sum((2, 3)) + np.float32(self.say["mask_downsample"]["bias"])
            # a mask is taken as it is, without the features' `no_mem_embed`: the decoder makes the object pointer alone
            bare = embed - np.asarray(self.say["no_memory"], np.float32).reshape(1, -1, 1, 1)
            found = self.decode(frame, bare, *nowhere, mask=dense[None, None], multimask=False)
            low = resize(square * 20 - 10, self.side // 4, self.side // 4)
            return {"logits": low[None, None], "pointer": found["pointer"], "score": np.full((1, 1), 10, np.float32)}
        points = [np.asarray(prompt[key], np.float32).reshape(-1, 2) for key in ("box", "points") if key in prompt]
        labels = [np.asarray([2, 3])] * ("box" in prompt) + [np.asarray(prompt.get("labels", []), int)]
        scale = np.asarray([self.side / self.size[1], self.side / self.size[0]], np.float32)
        return self.decode(frame, embed, np.concatenate(points) * scale, np.concatenate(labels))

    def remember(self, frame: int, found: dict[str, np.ndarray], prompted: bool) -> dict[str, np.ndarray]:
        (memory,) = self.run(
            "memory_encoder",
            image_embed=self.features(frame)[2],
            mask_logits=found["logits"],
            object_score_logits=found["score"],
            prompted=np.asarray([float(prompted)], np.float32),
        )
        return {"memory": memory, "pointer": found["pointer"]}

    def recall(self, frame: int, given: dict[int, Any], passed: dict[int, Any], backward: bool) -> np.ndarray:
        """Features of a frame conditioned on the prompted frames `given` and the visited ones `passed`."""
        sign, slots = (-1 if backward else 1), self.say["slots"]
        span = min(self.length, self.say["max_pointers"])
        spatial = [(slots - 1, one["memory"]) for one in given.values()]
        for distance in range(slots - 1, 0, -1):
            if frame - sign * distance in passed:
                spatial.append((distance - 1, passed[frame - sign * distance]["memory"]))
        past_only = self.say["only_obj_ptrs_in_the_past_for_eval"]
        pointers = [
            ((frame - t) * sign, one["pointer"]) for t, one in given.items() if not past_only or (frame - t) * sign >= 0
        ]
        for distance in range(1, span):
            if frame - sign * distance in passed:
                pointers.append((distance, passed[frame - sign * distance]["pointer"]))
        times = np.asarray([time for time, _ in pointers], np.float32)
        (conditioned,) = self.run(
            "memory_attention",
            image_embed=self.features(frame)[2],
            memories=np.concatenate([memory for _, memory in spatial]),
            memory_times=np.asarray([row for row, _ in spatial], np.int64),
            pointers=np.concatenate([pointer for _, pointer in pointers]),
            pointer_times=(times if self.say["use_signed_tpos_enc_to_obj_ptrs"] else abs(times)) / max(span - 1, 1),
        )
        return conditioned

    def follow(self, prompts: list[dict[str, Any]]) -> Iterator[tuple[int, np.ndarray, float]]:
        """One object on all frames: (frame, low-resolution logits [S/4, S/4], score)."""
        said = {int(prompt["frame"]): self.prompted(prompt) for prompt in prompts}
        given = {frame: self.remember(frame, found, True) for frame, found in sorted(said.items())}
        passed: dict[int, Any] = {}
        first = min(said)
        for backward, visited in ((False, range(first, self.length)), (True, range(first - 1, -1, -1))):
            for frame in visited:
                found = said.get(frame)
                if found is None:
                    conditioned = self.recall(frame, given, passed, backward)
                    tracking = self.say["multimask_output_for_tracking"] and self.say["multimask_points"][0] == 0
                    found = self.decode(frame, conditioned, np.zeros((1, 2)), np.asarray([-1]), multimask=tracking)
                    passed[frame] = self.remember(frame, found, False)
                yield frame, found["logits"][0, 0], float(found["score"][0, 0])


def propagate(run: Run, settings: dict[str, Any], frames: np.ndarray, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Logits float32 [N, T, H, W] and scores float32 [N, T] of all objects."""
    objects = sorted({int(prompt["object"]) for prompt in prompts})
    logits = np.full((len(objects), *frames.shape[:3]), ABSENT, np.float32)
    scores = np.full(logits.shape[:2], np.nan, np.float32)
    follower = Follower(run, settings, frames)
    for row, number in enumerate(objects):
        for frame, low, score in follower.follow([prompt for prompt in prompts if int(prompt["object"]) == number]):
            logits[row, frame] = resize(low, frames.shape[1], frames.shape[2], antialias=False)
            scores[row, frame] = score
    return {"logits": logits, "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("frames", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--logits", action="store_true", help="write float32 logits beside the masks")
    given = parser.parse_args()
    folder = Path(__file__).resolve().parent
    settings = folder / f"{stem(folder)}.json"
    frames = np.load(given.frames, allow_pickle=False)
    prompts = json.loads(given.prompts.read_text())
    found = propagate(graphs(folder), json.loads(settings.read_text()), frames, prompts)
    masks = {"masks": found["logits"] > 0, "scores": found["scores"]}
    np.savez_compressed(given.out, **masks, **({"logits": found["logits"]} if given.logits else {}))
    print(f"wrote {given.out}: {len(masks['masks'])} objects, {int(masks['masks'].sum())} pixels")


if __name__ == "__main__":
    main()
