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
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[..., list[np.ndarray]]
ABSENT = -1024.0  # logits where the object is not
MEMORIES = 7  # frames whose memories a frame looks at: those of prompts, and the six before it
MAX_POINTERS = 16  # frames whose object pointers it looks at
STABILITY_DELTA, MIN_STABILITY = 0.05, 0.98  # the single mask is kept where so much of it is sure
NO_POINT = np.zeros((1, 2)), np.asarray([-1])


def stem(folder: Path) -> str:
    """Return the stem that all files of a folder share."""
    (settings,) = folder.glob("medsam2_*.json")
    return settings.stem


def graphs(folder: Path) -> Run:
    """`run(part, **inputs)` over the `*.onnx` or `*.pt2` files of `folder`, each loaded when it is first used."""

    @functools.cache
    def load(part: str) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
        path = folder / f"{stem(folder)}_{part}.onnx"
        if path.is_file():
            import onnxruntime  # type: ignore[import-untyped]

            session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
            return lambda inputs: session.run(None, inputs)
        import torch

        program = torch.export.load(str(path.with_suffix(".pt2"))).module()

        def run_program(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            with torch.no_grad():
                outputs = program(*(torch.from_numpy(np.ascontiguousarray(value)) for value in inputs.values()))
            return [value.numpy() for value in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]

        return run_program

    return lambda part, **inputs: load(part)(inputs)


# --------------------------------------------------------------------------------------------------------- pixels


def weights(size: int, new_size: int, antialias: bool) -> np.ndarray:
    """Matrix [new_size, size] of a linear resampling; with `antialias`, wider where it shrinks (as PIL and PyTorch)."""
    scale = size / new_size
    reach = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(new_size) + 0.5) * scale - 0.5
    if not antialias:
        centres = centres.clip(0, size - 1)
    matrix = (1 - np.abs(np.arange(size)[None] - centres[:, None]) / reach).clip(0)
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def resize(values: np.ndarray, height: int, width: int, antialias: bool = True) -> np.ndarray:
    """[..., H, W] to [..., height, width]."""
    across = values.astype(np.float32) @ weights(values.shape[-1], width, antialias).T
    return np.asarray(weights(values.shape[-2], height, antialias) @ across, np.float32)


class Follower:
    """One clip, frames uint8 [T, H, W] or [T, H, W, 3]; `follow` takes one object through it.

    The features of the last `cache` frames are cached for the next object: 4 MB per frame at 512 px.
    """

    def __init__(self, run: Run, settings: dict[str, Any], frames: np.ndarray, cache: int = 64) -> None:
        self.run, self.settings, self.frames, self.side = run, settings, frames, settings["image_size"]
        self.features = functools.lru_cache(cache)(self.encode)

    def encode(self, frame: int) -> list[np.ndarray]:
        """high_res_feats_0, high_res_feats_1, image_embed of a frame."""
        picture = self.frames[frame]
        channels = picture[None] if picture.ndim == 2 else np.moveaxis(picture, -1, 0)
        small = (resize(channels, self.side, self.side) / 255).clip(0, 1)
        mean, std = (np.asarray(self.settings[key], np.float32)[:, None, None] for key in ("mean", "std"))
        image = ((np.broadcast_to(small, (3, self.side, self.side)) - mean) / std).astype(np.float32)
        return self.run("encoder", image=image[None])

    def decode(
        self,
        frame: int,
        embed: np.ndarray,
        points: np.ndarray,
        labels: np.ndarray,
        mask: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Low-resolution logits [1, 1, S/4, S/4], object pointer [1, C] and score [1, 1] of one object."""
        fine, middle, _ = self.features(frame)
        masks, ious, pointers, score = self.run(
            "tracker",
            image_embed=embed,
            high_res_feats_0=fine,
            high_res_feats_1=middle,
            point_coords=points[None].astype(np.float32),
            point_labels=labels[None].astype(np.float32),
            mask_input=np.zeros((1, 1, self.side // 4, self.side // 4), np.float32) if mask is None else mask,
            has_mask_input=np.asarray([float(mask is not None)], np.float32),
        )
        ambiguous = mask is None and int((labels >= 0).sum()) <= 1  # one click, or none at all
        best = 1 + int(ious[0, 1:].argmax())
        index = best if ambiguous or not stable(masks[0, 0]) else 0
        return {"logits": masks[:, [index]], "pointer": pointers[:, best if ambiguous else 0], "score": score}

    def prompted(self, prompt: dict[str, Any]) -> dict[str, np.ndarray]:
        """A frame as its prompt says."""
        frame = int(prompt["frame"])
        embed = self.features(frame)[2]
        if "mask" in prompt:
            mask = prompt["mask"]
            mask = np.load(mask, allow_pickle=False) if isinstance(mask, str) else mask
            square = (resize(np.asarray(mask, bool), self.side, self.side) >= 0.5).astype(np.float32)
            if not square.any():
                raise SystemExit(f"the mask of object {prompt['object']} on frame {frame} is empty")
            blocks = square.reshape(self.side // 4, 4, self.side // 4, 4).transpose(0, 2, 1, 3)
            kernel = np.asarray(self.settings["mask_downsample"]["weight"], np.float32)
            dense = (blocks * kernel).sum((2, 3)) + np.float32(self.settings["mask_downsample"]["bias"])
            # a mask is taken as it is, without the features' `no_mem_embed`: the decoder makes the object pointer alone
            bare = embed - np.asarray(self.settings["no_memory"], np.float32).reshape(1, -1, 1, 1)
            pointer = self.decode(frame, bare, *NO_POINT, mask=dense[None, None])["pointer"]
            low = resize(square * 20 - 10, self.side // 4, self.side // 4)
            return {"logits": low[None, None], "pointer": pointer, "score": np.full((1, 1), 10, np.float32)}
        points = [np.asarray(prompt[key], np.float32).reshape(-1, 2) for key in ("box", "points") if key in prompt]
        labels = [np.asarray([2, 3])] * ("box" in prompt) + [np.asarray(prompt.get("labels", []), int)]
        height, width = self.frames.shape[1:3]
        scale = np.asarray([self.side / width, self.side / height], np.float32)
        return self.decode(frame, embed, np.concatenate(points) * scale, np.concatenate(labels))

    def remember(self, frame: int, decoded: dict[str, np.ndarray], prompted: bool) -> dict[str, np.ndarray]:
        """Memory and object pointer of a frame."""
        (memory,) = self.run(
            "memory_encoder",
            image_embed=self.features(frame)[2],
            mask_logits=decoded["logits"],
            object_score_logits=decoded["score"],
            prompted=np.asarray([float(prompted)], np.float32),
        )
        return {"memory": memory, "pointer": decoded["pointer"]}

    def recall(self, frame: int, prompted: dict[int, Any], visited: dict[int, Any], sign: int) -> np.ndarray:
        """Features of a frame conditioned on the memories of prompted and visited frames; `sign` -1 goes backward."""
        span = min(len(self.frames), MAX_POINTERS)
        past: dict[int, Any] = {t: visited.get(frame - sign * t) for t in range(1, max(span, MEMORIES))}
        spatial = [(MEMORIES - 1, one["memory"]) for one in prompted.values()]
        spatial += [(t - 1, past[t]["memory"]) for t in range(MEMORIES - 1, 0, -1) if past[t]]
        pointers = [((frame - t) * sign, one["pointer"]) for t, one in prompted.items() if (frame - t) * sign >= 0]
        pointers += [(t, past[t]["pointer"]) for t in range(1, span) if past[t]]
        (conditioned,) = self.run(
            "memory_attention",
            image_embed=self.features(frame)[2],
            memories=np.concatenate([memory for _, memory in spatial]),
            memory_times=np.asarray([row for row, _ in spatial], np.int64),
            pointers=np.concatenate([pointer for _, pointer in pointers]),
            pointer_times=np.asarray([time for time, _ in pointers], np.float32) / max(span - 1, 1),
        )
        return conditioned

    def follow(self, prompts: list[dict[str, Any]]) -> Iterator[tuple[int, np.ndarray, float]]:
        """One object on all frames: (frame, low-resolution logits [S/4, S/4], score)."""
        answers = {int(prompt["frame"]): self.prompted(prompt) for prompt in prompts}
        prompted = {frame: self.remember(frame, decoded, True) for frame, decoded in sorted(answers.items())}
        visited: dict[int, Any] = {}
        first = min(answers)
        for sign, frames in ((1, range(first, len(self.frames))), (-1, range(first - 1, -1, -1))):
            for frame in frames:
                decoded = answers.get(frame)
                if decoded is None:
                    decoded = self.decode(frame, self.recall(frame, prompted, visited, sign), *NO_POINT)
                    visited[frame] = self.remember(frame, decoded, False)
                yield frame, decoded["logits"][0, 0], float(decoded["score"][0, 0])


def stable(logits: np.ndarray) -> bool:
    """Whether the single mask hardly changes with its threshold."""
    outer = int((logits > -STABILITY_DELTA).sum())
    return not outer or bool(np.float32((logits > STABILITY_DELTA).sum()) / np.float32(outer) >= MIN_STABILITY)


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
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    settings = json.loads((folder / f"{stem(folder)}.json").read_text())
    frames = np.load(options.frames, allow_pickle=False)
    results = propagate(graphs(folder), settings, frames, json.loads(options.prompts.read_text()))
    masks = results["logits"] > 0
    np.savez_compressed(
        options.out, masks=masks, scores=results["scores"], **({"logits": results["logits"]} if options.logits else {})
    )
    print(f"wrote {options.out}: {len(masks)} objects, {int(masks.sum())} pixels")


if __name__ == "__main__":
    main()
