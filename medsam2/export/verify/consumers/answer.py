"""Answers questions about an export with a program that its users have.

    python answer.py PROGRAM.py REQUEST.npz ANSWER.npz FILE...

PROGRAM.py defines a class `Consumer` that is made of the files and has `follow` (objects through a clip), `segment`
(one picture), and `banned`, the packages that such a user does not have. REQUEST.npz holds `questions` (JSON), `frames`
uint8 [T, 3, S, S] of the model's side S, and the inputs of each question by its number.
"""

from __future__ import annotations

import json
import runpy
import sys
from typing import Any

import numpy as np


def answers(consumer: Any, question: dict[str, Any], inputs: dict[str, Any], frames: Any) -> Any:
    """Logits and scores that answer one question."""
    first, stop = question["frames"]
    if question["kind"] == "image":
        return consumer.segment(frames[first], inputs)
    prompts = [{**one, **({"mask": inputs[one["mask"]]} if "mask" in one else {})} for one in question["prompts"]]
    return consumer.follow(frames[first:stop], prompts)


def main(program: str, request: str, answer: str, *files: str) -> None:
    """Write `NUMBER.PLACE` for each array of each answer."""
    consumer = runpy.run_path(program)["Consumer"](*files)
    with np.load(request, allow_pickle=False) as file:
        arrays = dict(file)
    results: dict[str, np.ndarray] = {}
    for number, question in enumerate(json.loads(bytes(arrays["questions"]).decode())):
        inputs = {name: arrays[f"{number}.{name}"] for name in question["inputs"]}
        values = answers(consumer, question, inputs, arrays["frames"])
        results |= {f"{number}.{place}": np.asarray(value) for place, value in enumerate(values)}
    imported = {name.split(".")[0] for name in sys.modules} & {"medsam2", *consumer.banned}
    if imported:
        sys.exit(f"{', '.join(sorted(imported))} was imported, which a user of this format does not have")
    np.savez(answer, **results)  # type: ignore[arg-type]  # its stub takes the names for options


if __name__ == "__main__":
    main(*sys.argv[1:])
