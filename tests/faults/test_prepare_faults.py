"""Faults while shards are prepared: no space, kills at seeded moments, a second prepare, a bad case."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from small_disk import mount, small_disk

from medsam2.errors import UserError
from medsam2.shards.prepare.run import PrepareOptions, prepare

RUN = """
import sys
from pathlib import Path
from medsam2.errors import UserError
from medsam2.shards.prepare import pool, stage
from medsam2.shards.prepare.run import PrepareOptions, prepare
{patch}
if __name__ == "__main__":
    try:
        result = prepare(Path(sys.argv[1]), Path(sys.argv[2]), PrepareOptions(workers={workers}))
    except UserError as error:
        sys.exit(f"error: {{error}}")
    print("prepared", result.num_cases, "failed", len(result.failures))
"""

IN_PROCESSES = "pool.BYTES_PER_WORKER = 1"

KILLER = """
import os, signal
original = stage.load_case
def load(ref):
    if ref.case_id == "smith_002":
        os.kill(os.getpid(), signal.SIGKILL)  # what the kernel does to a process that takes too much memory
    return original(ref)
stage.load_case = load
"""

SLOW = """
import time
original = stage.load_case
def load(ref):
    Path(sys.argv[2] + ".reading").touch()
    while Path(sys.argv[2] + ".reading").exists():
        time.sleep(0.02)
    return original(ref)
stage.load_case = load
"""


def start(tmp_path: Path, raw: Path, out: Path, patch: str = "", workers: int = 1) -> subprocess.Popen[str]:
    """A prepare in a process of its own; `patch` holds in its workers too, which import the script again."""
    script = tmp_path / f"run_{abs(hash(patch))}_{workers}.py"
    script.write_text(RUN.format(patch=patch, workers=workers))
    command = [sys.executable, str(script), str(raw), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB: room for some of the cases."""
    with small_disk(tmp_path / "disk", "160k") as folder:
        yield folder


def test_no_space_publishes_nothing_keeps_what_is_staged_and_the_same_command_goes_on(
    disk: Path, raw_folder: Path, shards: Path
):
    with pytest.raises(UserError, match="no space left while writing; free some and run the same command again"):
        prepare(raw_folder, disk / "shards", PrepareOptions())
    assert not {"index.arrow", "index.json"} & {p.name for p in (disk / "shards").iterdir()}
    staged = {p.name: p.stat().st_mtime_ns for p in (disk / "shards" / ".staging").glob("*.part")}
    assert staged
    assert mount("-o", "remount,size=16m", str(disk)) == 0
    prepare(raw_folder, disk / "shards", PrepareOptions())
    assert files(disk / "shards") == files(shards)


def test_no_space_while_shards_are_joined_keeps_the_finished_ones(disk: Path, raw_folder: Path, shards: Path):
    out = disk / "shards"
    staged = sum(p.stat().st_size for p in shards.glob("*.tar"))
    assert mount("-o", f"remount,size={staged * 5 // 4 // 1024 + 160}k", str(disk)) == 0
    with pytest.raises(UserError, match="no space left"):
        prepare(raw_folder, out, PrepareOptions())
    finished = {p.name for p in out.glob("*.tar")}
    assert finished
    assert all((out / name).read_bytes() == (shards / name).read_bytes() for name in finished)
    assert not (out / "index.arrow").exists()
    assert mount("-o", "remount,size=16m", str(disk)) == 0
    prepare(raw_folder, out, PrepareOptions())
    assert files(out) == files(shards)


def test_a_read_only_target_is_refused_in_one_line(disk: Path, raw_folder: Path):
    assert mount("-o", "remount,ro", str(disk)) == 0
    with pytest.raises(UserError, match=r"shards: cannot be written .*Read-only file system.* another folder"):
        prepare(raw_folder, disk / "shards", PrepareOptions())
    assert list(disk.iterdir()) == []


def test_published_shards_that_are_read_only_are_complete_all_the_same(disk: Path, raw_folder: Path):
    assert mount("-o", "remount,size=16m", str(disk)) == 0
    prepare(raw_folder, disk / "shards", PrepareOptions())
    assert mount("-o", "remount,ro", str(disk)) == 0
    assert prepare(raw_folder, disk / "shards", PrepareOptions()).already_complete


def test_a_second_prepare_into_the_same_folder_is_refused_and_the_first_is_unharmed(
    tmp_path: Path, raw_folder: Path, shards: Path
):
    out = tmp_path / "shards"
    reading = tmp_path / "shards.reading"
    first = start(tmp_path, raw_folder, out, SLOW)
    wait_for(reading, first)
    _, error = start(tmp_path, raw_folder, out).communicate(timeout=60)
    assert f"error: {out}: another prepare is writing there; wait for it to end." in error
    assert first.poll() is None
    while first.poll() is None:
        reading.unlink(missing_ok=True)
        time.sleep(0.02)
    assert first.communicate()[0] == "prepared 11 failed 0\n"
    assert files(out) == files(shards)


def test_a_lock_that_was_cleaned_away_keeps_nobody_in(tmp_path: Path, raw_folder: Path):
    """Whoever waits at the door with an old lock file must not believe that it is alone."""
    import fcntl

    from medsam2.shards.prepare.folder import lock_output, open_output

    output = open_output(tmp_path / "shards")
    with lock_output(output), open(output.staging / "lock") as old:
        (output.staging / "lock").unlink()
        with lock_output(output), pytest.raises(UserError, match="another prepare"), lock_output(output):
            pass
        with pytest.raises(BlockingIOError):
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_moment_it_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, raw_folder: Path, shards: Path, seed: int, workers: int
):
    rng = random.Random(f"{seed} {workers}")
    out = tmp_path / "shards"
    for _ in range(2):
        process = start(tmp_path, raw_folder, out, IN_PROCESSES if workers > 1 else "", workers)
        with suppress(AssertionError):
            wait_for(out / ".staging" / "configuration.json", process)
        time.sleep(rng.uniform(0, 0.6 * workers**2))
        process.kill()
        process.communicate()
    result = prepare(raw_folder, out, PrepareOptions())
    assert result.already_complete or result.num_cases == 11
    assert files(out) == files(shards)


def test_a_case_that_kills_its_worker_is_a_failed_case_and_the_others_are_prepared(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=6)
    out = tmp_path / "shards"
    output, error = start(tmp_path, folder, out, IN_PROCESSES + KILLER, workers=2).communicate(timeout=120)
    assert output == "prepared 5 failed 1\n", error
    entry = json.loads((out / "failures.jsonl").read_text())
    assert entry["case"] == "smith_002"
    assert "its worker was killed, probably because memory ran out" in entry["reason"]
    assert "fewer --workers" in entry["reason"]
