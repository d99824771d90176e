"""wandb out of reach: a step is delayed by a bounded time, the run goes on and says how to sync."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from ranks import SMALLEST, column, train
from small_shards import build
from wandb_files import history, records

from medsam2.config import compose
from medsam2.training.fit import fit
from medsam2.training.loggers.wandb_log import WandbLog

INIT, FINISH = 2, 3  # seconds


class Service(BaseHTTPRequestHandler):
    """As much of wandb's API as a run needs to begin; once `silent` is set, requests are taken and never answered."""

    protocol_version = "HTTP/1.1"
    silent: threading.Event

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.silent.is_set():
            time.sleep(60)
            return
        self.reply(answer(json.loads(content)) if self.path.endswith("/graphql") else {})

    do_PUT = do_GET = do_POST  # noqa: N815

    def reply(self, found: dict[str, Any]) -> None:
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    query, given = asked.get("query", ""), asked.get("variables") or {}
    if "upsertBucket" in query:
        project = {"name": "medsam2", "entity": {"name": "somebody"}}
        bucket = {
            "id": "abc", "name": given.get("name") or "abc", "displayName": "run", "description": "", "sweepName": None,
            "config": "{}", "project": project, "historyLineCount": 0,
        }  # fmt: skip
        return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
    if "viewer" in query:
        return {"data": {"viewer": {"id": "v", "entity": "somebody", "username": "somebody", "flags": "{}",
                                    "teams": {"edges": []}}}}  # fmt: skip
    return {"data": {"model": None, "serverInfo": None, "project": None, "entity": None}}


@pytest.fixture
def service() -> Iterator[tuple[str, threading.Event]]:
    silent = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Service,), {"silent": silent}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", silent
    server.shutdown()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that takes connections and never says anything."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def wandb_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No settings of the user who runs the tests, a key, short limits, and a service process of its own."""
    with a_world(monkeypatch, tmp_path):
        yield monkeypatch


@contextmanager
def a_world(patch: pytest.MonkeyPatch, home: Path) -> Iterator[None]:
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        patch.delenv(key)
    patch.setenv("HOME", str(home))
    patch.setenv("WANDB_API_KEY", "0" * 40)
    patch.setenv("WANDB_INIT_TIMEOUT", str(INIT))
    wandb.teardown()
    yield
    wandb.teardown()


def log_four(folder: Path, between: Callable[[], None]) -> list[float]:
    """Seconds of each of four calls and of the end; `between` is called after the second."""
    folder.mkdir()
    log, times = WandbLog(str(folder), INIT, FINISH), []
    for step in range(4):
        begun = time.monotonic()
        log.log_metrics({"train/loss": 1.5 + step}, step)
        times.append(time.monotonic() - begun)
        if step == 1:
            between()
    begun = time.monotonic()
    log.finalize("success")
    return [*times, time.monotonic() - begun]


def dotwandb(folder: Path, kind: str) -> Path:
    wandb.teardown()  # as at the end of a process: what its service holds is on disk after it
    (found,) = folder.glob(f"wandb/{kind}run-*/run-*.wandb")
    return found


def test_a_server_that_never_answers_delays_the_first_step_by_a_bounded_time(
    black_hole: str, wandb_world: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb_world.setenv("WANDB_BASE_URL", black_hole)
    times = log_four(tmp_path / "run", lambda: None)
    assert INIT - 0.5 < times[0] < INIT + 40
    assert max(times[1:]) < 2
    file, said = dotwandb(tmp_path / "run", "offline-"), capsys.readouterr().out
    assert f"wandb sync {file.parent}" in said and "cannot be reached" in said
    assert [row["train/loss"] for row in history(file)] == [1.5, 2.5, 3.5, 4.5]
    assert "cannot be reached" in (tmp_path / "run" / "events.csv").read_text()


def test_a_server_that_falls_silent_delays_no_step_and_the_end_by_a_bounded_time(
    service: tuple[str, threading.Event],
    wandb_world: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, silent = service
    wandb_world.setenv("WANDB_BASE_URL", url)
    times = log_four(tmp_path / "run", silent.set)
    assert max(times[1:-1]) < 2
    assert FINISH - 0.5 < times[-1] < FINISH + 15
    file, said = dotwandb(tmp_path / "run", ""), capsys.readouterr().out
    assert f"wandb sync {file.parent}" in said and "cannot be reached" not in said
    assert [row["train/loss"] for row in history(file)] == [1.5, 2.5, 3.5, 4.5]


def test_without_a_key_the_run_is_logged_offline_and_nothing_is_asked(
    service: tuple[str, threading.Event], wandb_world: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wandb_world.setenv("WANDB_BASE_URL", service[0])
    wandb_world.delenv("WANDB_API_KEY")
    assert max(log_four(tmp_path / "run", lambda: None)) < 15
    assert len(history(dotwandb(tmp_path / "run", "offline-"))) == 4


# -------------------------------------------------------------------------------------------------- whole runs


def run(shards: Path, folder: Path, *more: str) -> None:
    own = (f"data.shards={shards}", f"output={folder}", "trainer.progress=none", "trainer.max_steps=4")
    validated = ("validation.cases=1", "trainer.val_every=2")
    fit(compose("train", [*SMALLEST, *own, *validated, *more]))


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with a server that never answers, then interrupted and gone on with for two, WANDB_MODE=offline."""
    folder = tmp_path_factory.mktemp("observed") / "run"
    with pytest.MonkeyPatch.context() as patch, socket.socket() as server, a_world(patch, folder.parent):
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        shards = build(tmp_path_factory.mktemp("secret-place") / "shards")
        run(
            shards,
            folder,
            "logger=[csv,wandb]",
            f"logger.wandb.finish_seconds={FINISH}",
            "trainer.max_steps=2",
            "trainer.schedule_steps=4",
        )
        wandb.teardown()
        patch.setenv("WANDB_MODE", "offline")
        run(shards, folder, "logger=wandb", "resume=auto")
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_wandb_run(observed: Path) -> None:
    files = files_of(observed)
    assert len(files) == 2 and files[0].stem == files[1].stem
    steps = [{row["trainer/global_step"] for row in history(file) if "train/loss" in row} for file in files]
    assert steps == [{0, 1}, {2, 3}]


def test_a_run_out_of_reach_says_so_in_its_report(observed: Path) -> None:
    page = (observed / "report.html").read_text()
    assert "wandb cannot be reached" in page and "wandb sync wandb/offline-run-" in page


def test_wandb_has_the_figures_of_the_csv_and_pictures(observed: Path) -> None:
    rows = [row for file in files_of(observed) for row in history(file)]
    names = {key for row in rows for key in row}
    assert {f"train/{name}" for name in ("focal", "dice", "iou", "presence", "grad_norm", "data_wait",
                                         "clips_per_second", "memory_gb")} <= names  # fmt: skip
    assert any(name.startswith("train/loss_") for name in names) and any(name.startswith("lr-") for name in names)
    assert any(name.startswith("val/") and name.count("/") == 3 for name in names), "by modality and structure"
    assert any(name.startswith("pictures/") for name in names)
    assert list(observed.glob("wandb/*/files/media/images/pictures/*.png"))
    for name in ("train/loss", "val/dsc", "train/grad_norm"):
        on_disk = {step: float(value) for step, value in column(observed, name).items()}
        assert {row["trainer/global_step"]: row[name] for row in rows if name in row} == on_disk != {}


def test_wandb_has_the_configuration_and_no_paths(observed: Path) -> None:
    files = files_of(observed)
    found = [item for record in records(files[0]) for item in [*record.run.config.update, *record.config.update]]
    config = {item.key: json.loads(item.value_json) for item in found}
    assert config["seed"] == 3 and config["optim"]["lr"] > 0
    assert (config["output"], config["data"]["shards"]) == ("run", ["shards"])
    for file in files:
        content = file.read_bytes()
        assert b"secret-place" not in content and str(observed.parent).encode() not in content
        assert f'"{socket.gethostname()}"'.encode() not in content


@pytest.mark.slow
def test_of_two_ranks_one_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(build(tmp_path / "shards"), tmp_path / "run", 2, "logger=wandb", "trainer.max_steps=2")
    assert len(files_of(tmp_path / "run")) == 1
