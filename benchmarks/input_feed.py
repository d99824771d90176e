"""Waiting time of a consumer that takes clips at a fixed rate from two workers of the real `ClipDataModule`.

    python benchmarks/input_feed.py SHARDS_OR_URL RATE SECONDS    # one line of JSON
    python benchmarks/input_feed.py serve FOLDER [MS]    # an HTTP server that answers after MS; prints its address

`benchmarks/input.py` runs it. The clock starts after the first batches, when all workers run. The consumer then
requests batches at the fixed rate, and its waiting time is counted. Bytes per clip are all bytes that the server sent
until the last batch, with prefetched ones, over the clips of all batches.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import time
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from input_ours import CLIPS, settings_of

OBJECTS = 3
WARM = 2  # batches before the clock starts


class Server(ThreadingHTTPServer):
    """Waits `latency` seconds before each answer, and counts the bytes of files that it sent."""

    latency = 0.0
    sent = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that terminated workers close."""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files or ranges of them, and the number of bytes sent under /sent; keeps connections open."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits 40 ms for the client's acknowledgement
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.path == "/sent":
            self._answer(200, str(self.server.sent).encode(), {})
            return
        time.sleep(self.server.latency)
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not wanted:
            super().do_GET()
            self.server.sent += path.stat().st_size if path.is_file() else 0
            return
        total = path.stat().st_size
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        with open(path, "rb") as file:
            file.seek(int(first))
            body = file.read(int(last or total - 1) - int(first) + 1)
        self._answer(206, body, {"Content-Range": f"bytes {first}-{int(first) + len(body) - 1}/{total}"})
        self.server.sent += len(body)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def serve(folder: str, milliseconds: float = 0.0) -> None:
    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    server.latency = milliseconds / 1e3
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


def sent(address: str) -> int:
    """Return the number of bytes that a server has sent so far; 0 for a local folder."""
    if not address.startswith("http"):
        return 0
    with urllib.request.urlopen(f"{address}/sent") as answer:
        return int(answer.read())


def consume(shards: str, rate: float, seconds: float) -> dict[str, float]:
    """Return the share of waiting time, the longest wait in ms, clips per second, and seconds to the first batch.

    It also returns CPU ms per clip of the workers and of the consuming process, which do not depend on other load.
    """
    import torch

    from medsam2.data.datamodule import ClipDataModule

    torch.set_num_threads(1)
    began = time.perf_counter()
    bytes_before = sent(shards)
    module = ClipDataModule(settings_of(shards, OBJECTS, workers=2))
    batches = iter(module.train_dataloader())
    next(batches)
    first = time.perf_counter() - began
    for _ in range(WARM - 1):
        next(batches)
    step = CLIPS / rate
    count, waited, longest = max(1, int(seconds / step)), 0.0, 0.0
    before, own, start = workers_cpu(), time.process_time(), time.perf_counter()
    due = start
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(batches)
        wait = time.perf_counter() - asked
        assert len(batch.keys) == CLIPS
        del batch
        waited, longest = waited + wait, max(longest, wait)
        due = max(due + step, asked + wait)  # taking a batch is part of a step; lost time is not made up for
        time.sleep(max(0.0, due - time.perf_counter()))
    took, own, workers = time.perf_counter() - start, time.process_time() - own, workers_cpu() - before
    return {
        "waited_percent": round(100 * waited / took, 1),
        "longest_wait_ms": round(1e3 * longest),
        "clips_a_second": round(count * CLIPS / took, 1),
        "first_batch_s": round(first, 1),
        "mb_a_clip": round((sent(shards) - bytes_before) / 1e6 / ((count + WARM) * CLIPS), 2),
        "workers_cpu_ms": round(1e3 * workers / (count * CLIPS), 2),
        "consumer_cpu_ms": round(1e3 * own / (count * CLIPS), 2),
    }


def workers_cpu() -> float:
    """Return the CPU seconds that the loader's workers have used."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], *map(float, sys.argv[3:4]))
    else:
        target, rate, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
        print(json.dumps(consume(target, rate, seconds)))
