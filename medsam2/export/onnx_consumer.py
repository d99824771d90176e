"""A user of exported graphs: runs what is asked of it with the folder's own script, without medsam2.

    python onnx_consumer.py FOLDER REQUEST.npz ANSWER.npz

It is started as a file of its own by `onnx_check`, so that neither this package nor (for ONNX) PyTorch can help.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def script(folder: Path) -> Any:
    """`propagate.py` as it lies in the folder."""
    spec = importlib.util.spec_from_file_location("propagate", folder / "propagate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder: str, request: str, answer: str) -> None:
    """Answer every item of the request: single graphs, prompts on one picture, and clips.

    Written: `NUMBER.PLACE` for the outputs of a graph, `NUMBER.logits` and `NUMBER.scores` for the rest.
    """
    propagate = script(Path(folder))
    with np.load(request, allow_pickle=False) as file:
        given = dict(file)
    items = json.loads(bytes(given.pop("items")).decode())
    run = propagate.graphs(Path(folder))
    (settings,) = Path(folder).glob("medsam2_*.json")
    say = json.loads(settings.read_text())
    answers: dict[str, np.ndarray] = {}
    for number, item in enumerate(items):
        inputs = {name: given[f"{number}.{name}"] for name in item["inputs"]}
        if item["kind"] == "graph":
            found = run(item["part"], **inputs)
            answers |= {f"{number}.{place}": value for place, value in enumerate(found)}
            continue
        first, stop = item["frames"]
        frames = given["frames"][first:stop]
        if item["kind"] == "clip":
            prompts = [{**one, **({"mask": inputs[one["mask"]]} if "mask" in one else {})} for one in item["prompts"]]
            found = propagate.propagate(run, say, frames, prompts)
            answers |= {f"{number}.logits": found["logits"], f"{number}.scores": found["scores"]}
            continue
        fine, middle, embed = propagate.Follower(run, say, frames).features(0)
        logits, ious = run("decoder", image_embed=embed, high_res_feats_0=fine, high_res_feats_1=middle, **inputs)
        answers |= {f"{number}.logits": logits, f"{number}.scores": ious}
    banned = {"medsam2", "sam2"} | ({"torch"} if any(Path(folder).glob("*.onnx")) else set())
    found_modules = banned & {name.split(".")[0] for name in sys.modules}
    if found_modules:
        sys.exit(f"{', '.join(sorted(found_modules))} was imported: a user of these graphs does not have it")
    np.savez(answer, **answers)  # type: ignore[arg-type]  # its stub takes the names for options


if __name__ == "__main__":
    main(*sys.argv[1:])
