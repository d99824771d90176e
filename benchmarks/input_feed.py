"""How long a consumer waits that takes clips at a fixed rate from two workers of the real `ClipDataModule`.

    python benchmarks/input_feed.py SHARDS_OR_URL RATE SECONDS [CACHE]    # one line of JSON
    python benchmarks/input_feed.py serve FOLDER                         # an HTTP server; prints its address

Run by `benchmarks/input.py`. The first batches are waited for (the workers start), then the clock runs: the consumer
asks for a batch when the rate says so, and what it waits is counted.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from input_ours import CLIPS, settings_of

OBJECTS = 3
WARM = 2  # batches that are waited for before the clock runs


class Quiet(SimpleHTTPRequestHandler):
    """Serves whole files; connections stay open."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


def serve(folder: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


def consume(shards: str, rate: float, seconds: float, cache: str | None) -> dict[str, float]:
    """Share of the time waited, the longest wait in ms, the clips a second that arrived, seconds to the first batch.

    And CPU ms a clip of the workers and of the consuming process: what other load on the machine does not change.
    """
    import torch

    from medsam2.data.cache_settings import CacheSettings
    from medsam2.data.datamodule import ClipDataModule

    torch.set_num_threads(1)
    began = time.perf_counter()
    more = {"cache": CacheSettings(folder=Path(cache))} if cache else {}
    module = ClipDataModule(settings_of(shards, OBJECTS, workers=2, **more))
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
        due = max(due + step, asked + wait)  # taking a batch is part of a step; a late one is not caught up with
        time.sleep(max(0.0, due - time.perf_counter()))
    took, own, workers = time.perf_counter() - start, time.process_time() - own, workers_cpu() - before
    return {
        "waited_percent": round(100 * waited / took, 1),
        "longest_wait_ms": round(1e3 * longest),
        "clips_a_second": round(count * CLIPS / took, 1),
        "first_batch_s": round(first, 1),
        "workers_cpu_ms": round(1e3 * workers / (count * CLIPS), 2),
        "consumer_cpu_ms": round(1e3 * own / (count * CLIPS), 2),
    }


def workers_cpu() -> float:
    """CPU seconds that the loader's workers have used."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        target, rate, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
        print(json.dumps(consume(target, rate, seconds, sys.argv[4] if len(sys.argv) > 4 else None)))
