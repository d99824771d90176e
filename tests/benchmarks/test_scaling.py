"""The simulation behind docs/explanation/scaling.md: hand-made cases with a known outcome, and the real plan, small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from scaling_feed import Line, Machine, feed  # noqa: E402
from scaling_index import write  # noqa: E402
from scaling_plan import Cluster, Demand, balance, ranges  # noqa: E402
from scaling_yield import Costs, all_reduce, limits, step  # noqa: E402

# Machines that read by range


def machine(order: list[list[int]], **line: Any) -> Machine:
    """Clips of 10 bytes, and an order that is repeated."""
    given = {"connections": 1, "connection": 10.0, "machine": 10.0, "ahead": 1, **line}
    return Machine(lambda number: order[number % len(order)], np.full(100, 10), Line(**given))


ONE_A_STEP = [[n] for n in range(50)]


def test_a_clip_a_step_that_takes_as_long_as_the_step_is_never_waited_for() -> None:
    fed = feed([machine(ONE_A_STEP)], 40, 10, 1.0)
    assert fed.stalled == 0 and fed.seconds == pytest.approx(30) and fed.fetched == pytest.approx(10)
    assert fed.first == pytest.approx(1)


def test_a_request_that_takes_twice_the_step_doubles_the_time() -> None:
    fed = feed([machine(ONE_A_STEP, connection=5.0, ahead=4)], 40, 10, 1.0)
    assert fed.seconds == pytest.approx(60) and fed.stalled == pytest.approx(0.5)


def test_connections_share_what_a_machine_has() -> None:
    order = [[2 * n, 2 * n + 1] for n in range(40)]
    two = feed([machine(order, connections=2, machine=20.0, ahead=3)], 30, 10, 1.0)
    shared = feed([machine(order, connections=2, machine=10.0, ahead=3)], 30, 10, 1.0)
    assert two.stalled == 0 and shared.seconds == pytest.approx(2 * two.seconds)


def test_all_machines_wait_for_the_slowest() -> None:
    fast, slow = machine(ONE_A_STEP), machine(ONE_A_STEP, connection=5.0, ahead=3)
    assert feed([fast, slow], 30, 10, 1.0).seconds == pytest.approx(40)


def test_a_pause_and_a_limit_of_requests_hold_connections() -> None:
    assert feed([machine(ONE_A_STEP, pause=1.0, ahead=4)], 40, 10, 1.0).stalled == pytest.approx(0.5)
    assert feed([machine(ONE_A_STEP, pause=1.0, connections=2, machine=20.0, ahead=4)], 40, 10, 1.0).stalled == 0
    limited = machine(ONE_A_STEP, connections=4, machine=40.0, ahead=8, most=0.5)
    assert feed([limited], 40, 20, 1.0).stalled == pytest.approx(0.5, abs=0.05)


# Costs of a step


def test_one_gpu_exchanges_nothing_and_more_machines_exchange_longer() -> None:
    costs = Costs()
    seconds = [all_reduce(costs, costs.gradient_bytes, ranks, 8) for ranks in (1, 8, 16, 128, 1024)]
    assert seconds[0] == 0 and seconds == sorted(seconds) and len(set(seconds)) == 5
    assert seconds[-1] > 2 * 127 / 128 * costs.gradient_bytes / costs.between


def test_gradients_hide_behind_the_backward_pass_but_for_the_last_part() -> None:
    slow = Costs(between=1e9)
    hidden, bare = step(Costs(), 1024, 8, 8, 1.0), step(slow, 1024, 8, 8, 1.0)
    assert hidden.exchange == pytest.approx(all_reduce(Costs(), 25e6, 1024, 8))
    assert bare.exchange == pytest.approx(all_reduce(slow, 25e6, 1024, 8))  # 0.3 s behind 0.29 s, and the last part
    assert step(Costs(between=1e8), 1024, 8, 8, 1.0).exchange > 2
    assert step(Costs(), 1, 8, 8, 1.25).straggler == pytest.approx(8 * 0.06 * 0.4 * 0.25)


def test_the_scarcest_resource_is_the_limit() -> None:
    costs = Costs(request_s=0.1, decode_s=0.01, request_cpu_s=0.002, requests=1000.0, workers=2)
    found = limits(costs, 64, 8, 1e9, 2e6, 1.25, 8)
    assert min(found, key=lambda name: found[name]) == "bucket's requests" and found["bucket's requests"] == 800
    seconds = 0.1 + 2e6 / min(0.1e9, 12.5e9 / 128) + 0.096  # 128 ranges of a machine share its network
    assert found["workers that wait"] == pytest.approx(64 * 2 * 8 / seconds)
    assert limits(Costs(bucket=1e9), 1024, 8, 17_000.0, 10e6, 1.0, 8)["bucket"] == 100


# The real plan


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("scaling") / "shards"
    return folder, write(folder, 600, 16, 16 << 20)


def test_the_generated_index_has_the_shards_that_were_asked_for(index: tuple[Path, Any]) -> None:
    sizes = index[1]
    assert 500 < len(sizes.shard_bytes) < 800 and sizes.shard_bytes.sum() == sizes.segment_bytes.sum()
    assert np.median(sizes.shard_bytes) == pytest.approx(16 << 20, rel=0.15)
    assert (np.diff(sizes.shard_of) >= 0).all()


def test_every_rank_has_as_many_clips_and_machines_together_read_the_global_batch(index: tuple[Path, Any]) -> None:
    demand = Demand(*index, Cluster(64, 8, 2))
    even = balance(demand, 2)
    assert even["clips_most_over_least"] == 1 and even["objects_most_over_mean"] >= 1
    rows = [row for node in range(8) for row in demand.rows(1, node)]
    assert rows == [entry.row for entry in demand.plan.batch(1)]


def test_a_clip_by_range_is_its_span_or_eight_frames_that_lie_far_apart(index: tuple[Path, Any]) -> None:
    sizes = index[1]
    read, frame = ranges(sizes, 16), sizes.segment_bytes / 16
    spans = np.round(read.bytes / frame).astype(int)
    assert set(spans.tolist()) == {8, 15} and np.mean(spans == 8) == pytest.approx(0.5, abs=0.1)
    assert (read.requests[(frame < 1 << 20) & (frame * 15 < 1 << 24)] == 1).all()
    far = ranges(sizes, 1)  # as if a segment were one frame, of more than a megabyte
    assert set(far.requests[sizes.segment_bytes > 1 << 20].tolist()) >= {8}


@pytest.mark.slow
def test_the_benchmark_ends_with_a_line_of_json_and_draws_its_figure(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--quick", "--shards", "400", "--gpus", "1", "32",
               "--gradient-mb", "1", "--figure", str(tmp_path / "scaling.png")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["name"] == "scaling" and [row["gpus"] for row in found["ours"]] == [1, 32]
    last = found["ours"][-1]
    assert 1 <= last["requests_a_clip"] < 1.1 and last["mb_a_clip"] < 3
    assert found["ratio_time"] >= 1 and found["ratio_memory"] == pytest.approx(1, abs=0.2)
    assert all(0 < row["efficiency"] <= 1 for row in found["ours"])
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
