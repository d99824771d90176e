"""A client of MONAI Label: starts its server with an app and a folder of volumes, and asks it for masks.

    python monailabel_program.py APP STUDIES REQUEST.npz ANSWER.npz

Keys of the request: `items`, a JSON list of {"model", "image", "params"}. Keys of the answer: `N.status`, the HTTP
status, and `N.mask` bool [Z, Y, X], empty where there is none; `info`, JSON: what the server says about its models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import SimpleITK as sitk
from served import served


def inferred(client: httpx.Client, item: dict[str, Any]) -> tuple[int, np.ndarray]:
    """Status and mask [Z, Y, X] (empty where it fails)."""
    found = client.post(
        f"/infer/{item['model']}",
        params={"image": item["image"], "output": "image"},
        data={"params": json.dumps(item["params"])},
        headers={"Connection": "close"},  # the server hangs up after an error
    )
    if found.is_error:
        return found.status_code, np.zeros((0, 0, 0), bool)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mask.nii.gz"
        path.write_bytes(found.content)
        return found.status_code, sitk.GetArrayFromImage(sitk.ReadImage(str(path))) > 0


def main(app: str, studies: str, request: str, answer: str) -> None:
    """Ask for all masks of the request, in order."""
    with np.load(request, allow_pickle=False) as file:
        items = json.loads(str(file["items"]))
    answers: dict[str, np.ndarray] = {}

    def command(port: int) -> list[str]:
        where = ["--app", app, "--studies", studies, "--host", "127.0.0.1", "--port", str(port)]
        return ["-m", "monailabel.main", "start_server", *where]

    with served(command, "/info/", Path(studies).parent) as client:
        answers["info"] = np.array(json.dumps(client.get("/info/").raise_for_status().json()["models"]))
        for number, item in enumerate(items):
            status, answers[f"{number}.mask"] = inferred(client, item)
            answers[f"{number}.status"] = np.array(status)
    np.savez(answer, **answers)  # type: ignore[arg-type]  # its stub takes the names for options


if __name__ == "__main__":
    main(*sys.argv[1:])
