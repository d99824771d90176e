"""A small HTTP server on the loopback address that counts requests and misbehaves when told to."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What one GET of a file meets: another status; or silence after `stop` bytes of the body, and then its end.

    `wait` seconds pass between the bytes that are sent and the cut of the connection.
    """

    status: int = 200
    stop: int | None = None
    wait: float = 0.0


@dataclass
class HttpShards:
    """Serves the files of a folder under /shards/, whole or by range.

    Attributes:
        folder: what is served; files may change.
        faults: by file name, what its next GETs meet, one each; then all is well again.
        gets: how often each file was asked for; ranged: how often a part of it.
        pause: seconds that each request takes at least.
        ignores_ranges: whether the whole file comes, with status 200, where a part is asked for.
        sent: bytes of all bodies.
        queries: the query of each request.
    """

    folder: Path
    pause: float = 0.0
    ignores_ranges: bool = False
    sent: int = 0
    ranged: Counter[str] = field(default_factory=Counter)
    faults: dict[str, deque[Fault]] = field(default_factory=dict)
    gets: Counter[str] = field(default_factory=Counter)
    queries: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._gone = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/shards"

    @property
    def closed(self) -> bool:
        return self._gone.is_set()

    def fail(self, name: str, *faults: Fault) -> None:
        """What the next GETs of a file meet."""
        self.faults[name] = deque(faults)

    def close(self) -> None:
        """Refuse connections from now on."""
        self._gone.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> HttpShards:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.closed:
            self.close()

    def note(self, name: str, query: str) -> Fault:
        """Count a request; the fault that it meets."""
        with self._lock:
            self.gets[name] += 1
            self.queries.append(query)
            planned = self.faults.get(name)
            return planned.popleft() if planned else Fault()

    def wait(self, seconds: float) -> None:
        """Time that passes for one request, at most until the server is closed."""
        self._gone.wait(seconds)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        shards = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # a body is sent at once, not when its head has been acknowledged (40 ms)

            def log_message(self, format: str, *args: Any) -> None:
                """Tests read the counters."""

            def do_GET(self) -> None:
                if shards.closed:  # connections that were kept alive end too
                    self.close_connection = True
                    return
                parts = urlsplit(self.path)
                name = unquote(parts.path).removeprefix("/shards/")
                fault = shards.note(name, parts.query)
                path = shards.folder / name
                status = fault.status if fault.status != 200 else 200 if path.is_file() else 404
                if status != 200:
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = path.read_bytes()
                total = len(body)
                wanted = self.headers.get("Range")
                shards.ranged[name] += bool(wanted)
                if shards.ignores_ranges:
                    wanted = None
                if wanted:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    start, end = int(first), min(int(last or total - 1), total - 1)
                    body, status = body[start : end + 1], 206 if start < total else 416
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Accept-Ranges", "bytes")
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
                self.end_headers()
                self._send(body, fault)

            def _send(self, body: bytes, fault: Fault) -> None:
                shards.wait(shards.pause)
                with shards._lock:
                    shards.sent += len(body)
                try:
                    if fault.stop is None:
                        self.wfile.write(body)
                        return
                    self.wfile.write(body[: fault.stop])
                    self.wfile.flush()
                    shards.wait(fault.wait)
                except OSError:
                    """The client is gone."""
                self.close_connection = True

        return Handler
