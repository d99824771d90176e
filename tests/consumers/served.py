"""Another program's server, started as its users start it, and a client of its REST API.

For the programs of this folder, which run without medsam2: they import it as `from served import served`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

SECONDS = 240  # for the start, most of which goes into imports, and for each answer


@contextmanager
def served(command: Callable[[int], Sequence[str]], ready: str, folder: Path) -> Iterator[httpx.Client]:
    """A client of the server that `python COMMAND(port)` starts in `folder`; ends it afterwards.

    Args:
        ready: a path that answers as soon as the server works.

    Raises:
        SystemExit: it does not start, or whatever is asked of it fails; with what the server printed.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    with TemporaryDirectory() as place, (Path(place) / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command(port)], cwd=folder, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS, trust_env=False) as client:
                _wait(client, ready, process)
                yield client
        except httpx.HTTPError as error:
            log.seek(0)
            sys.exit(f"{error}\n{log.read()[-5000:]}")
        finally:
            process.terminate()
            process.wait()


def _wait(client: httpx.Client, ready: str, process: subprocess.Popen[str]) -> None:
    """Until `ready` answers.

    Raises:
        httpx.HTTPError: it does not, or the server ends.
    """
    end = time.monotonic() + SECONDS
    while True:
        try:
            client.get(ready).raise_for_status()
            return
        except httpx.TransportError:
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.2)
