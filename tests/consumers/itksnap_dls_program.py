"""A user of ITK-SNAP: starts the itksnap-dls server in a folder, uploads slices and clicks on them.

    python itksnap_dls_program.py FOLDER REQUEST.npz ANSWER.npz

The requests are those of ITK-SNAP's own client (`DeepLearningSegmentationModel`), in its order. Keys of the request:
`slice.N` float32 [H, W] or [H, W, 3], and `clicks`, JSON: a list of [x, y, on the object] for each slice. Keys of
the answer: `N.K` bool [H, W], the mask after K + 1 clicks, and `N.again`, after a reset and the first click; `models`,
JSON: what the server says that it has.
"""

from __future__ import annotations

import base64
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from served import served

MODEL = "SAM2"


def asked(client: httpx.Client, path: str, **parameters: Any) -> Any:
    """The JSON value of a GET."""
    return client.get(path, params=parameters).raise_for_status().json()


def upload(client: httpx.Client, session: str, values: np.ndarray) -> None:
    """A slice [H, W] or [H, W, C], as it is: float32, gzipped, with its sides in ITK's order."""
    said = {"dimensions": values.shape[1::-1], "components_per_pixel": values.shape[2] if values.ndim == 3 else 1}
    file = gzip.compress(np.ascontiguousarray(values, np.float32).tobytes())
    client.post(
        f"/upload_raw/{session}?filename=upload.nii.gz",
        files={"file": ("upload", file)},
        data={"metadata": json.dumps(said)},
    ).raise_for_status()


def click(client: httpx.Client, session: str, at: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """The mask after one more click (x, y, on the object)."""
    found = asked(
        client, f"/v2/process_point_interaction/{session}", point=at[:2], foreground="true" if at[2] else "false"
    )
    values = np.frombuffer(gzip.decompress(base64.b64decode(found["result"])), np.int8)
    return values.reshape(shape[:2]) > 0


def main(folder: str, request: str, answer: str) -> None:
    """Click through all slices of the request in one session."""
    with np.load(request, allow_pickle=False) as file:
        given = dict(file)
    answers: dict[str, np.ndarray] = {}
    with served(command, "/status", Path(folder)) as client:
        answers["models"] = np.array(json.dumps(asked(client, "/v2/models")["models"]))
        session = asked(client, f"/v2/start_session/{MODEL}")["session_id"]
        for number, clicks in enumerate(json.loads(str(given["clicks"]))):
            values = given[f"slice.{number}"]
            upload(client, session, values)
            for count, at in enumerate(clicks):
                answers[f"{number}.{count}"] = click(client, session, at, values.shape)
            asked(client, f"/reset_interactions/{session}")
            answers[f"{number}.again"] = click(client, session, clicks[0], values.shape)
        asked(client, f"/v2/end_session/{session}")
    np.savez(answer, **answers)  # type: ignore[arg-type]  # its stub takes the names for options


def command(port: int) -> list[str]:
    """How the page says to start it, on one address and a free port."""
    return ["-m", "itksnap_dls", "--no-network", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]


if __name__ == "__main__":
    main(*sys.argv[1:])
