"""One train.py for all launchers: ranks started by hand, by torchrun, by something like srun; sweeps as jobs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy
from ranks import ROOT, SMALLEST, column, command
from small_shards import build

from medsam2.config import compose, validate
from medsam2.errors import UserError
from medsam2.training.fit import make_trainer
from medsam2.training.launch.ranks import EnvironmentRanks, launch_plugins, make_strategy
from medsam2.training.settings import TrainSettings

LIMIT = 240.0
STEPS = 2
# What srun says to its tasks, in the words of submitit's local tasks.
AS_SRUN = """
export SLURM_NTASKS=$SUBMITIT_LOCAL_NTASKS SLURM_NTASKS_PER_NODE=$SUBMITIT_LOCAL_NTASKS
export SLURM_PROCID=$SUBMITIT_LOCAL_GLOBALID SLURM_LOCALID=$SUBMITIT_LOCAL_LOCALID SLURM_NODEID=0 SLURM_STEP_ID=0
export SLURM_JOB_ID=$SUBMITIT_LOCAL_JOB_ID SLURM_JOB_NAME=medsam2 SLURM_NODELIST=127.0.0.1 SLURM_NNODES=1
exec "$0" "$@"
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        return build(tmp_path_factory.mktemp("launch") / "shards")


@pytest.fixture(scope="module")
def plain_losses(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The losses of two ranks that were started by hand, one after the other, each with its RANK."""
    output = tmp_path_factory.mktemp("launch") / "plain"
    more = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            run(shards, output), env=environment(RANK=str(rank), **more), stderr=subprocess.PIPE, text=True
        )
        for rank in (1, 0)
    ]
    errors = [rank.communicate(timeout=LIMIT)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    return two_losses(output)


def run(shards: Path, output: Path) -> list[str]:
    return command(shards, output, 2, f"trainer.max_steps={STEPS}")


def environment(**more: str) -> dict[str, str]:
    """Without what another launcher may have left, here or around this test."""
    words = ("SLURM_", "SUBMITIT_", "TORCHELASTIC_", "MASTER_")
    known = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    own = {name: text for name, text in os.environ.items() if not name.startswith(words) and name not in known}
    return {**own, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def two_losses(output: Path) -> dict[int, str]:
    found = column(output, "train/loss")
    assert len(found) == STEPS
    return found


def settings(*more: str) -> TrainSettings:
    given = [*SMALLEST, "data.shards=x", "output=y", "trainer=ddp", "trainer.accelerator=cpu", *more]
    return validate(TrainSettings, compose("train", [*given, "trainer.precision=32-true"]))


# ------------------------------------------------------------------------------------------------- real runs


@pytest.mark.slow
def test_ranks_started_by_hand_make_one_run(plain_losses: dict[int, str]) -> None:
    assert all(float(loss) > 0 for loss in plain_losses.values())


@pytest.mark.slow
def test_torchrun_makes_the_same_run(shards: Path, tmp_path: Path, plain_losses: dict[int, str]) -> None:
    port = f"--master-port={free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", port]
    started = [*torchrun, *run(shards, tmp_path / "run")[1:]]
    done = subprocess.run(started, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert two_losses(tmp_path / "run") == plain_losses
    assert done.stdout.count("Trainable parameters") == 1


@pytest.mark.slow
def test_tasks_like_those_of_srun_make_the_same_run(
    shards: Path, tmp_path: Path, plain_losses: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks of one job of submitit's local executor, which see the variables that srun sets."""
    submitit = pytest.importorskip("submitit")
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executor = submitit.LocalExecutor(folder=tmp_path / "job")
    executor.update_parameters(tasks_per_node=2, timeout_min=5)
    started = ["bash", "-c", AS_SRUN, *run(shards, tmp_path / "run")]
    job = executor.submit(submitit.helpers.CommandFunction(started, verbose=False))
    job.results()
    assert two_losses(tmp_path / "run") == plain_losses


@pytest.mark.slow
def test_a_sweep_is_a_job_for_each_combination(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    started = [
        sys.executable, str(ROOT / "train.py"), "--multirun", "hydra/launcher=submitit_local", *SMALLEST,
        f"data.shards={shards}", f"trainer.max_steps={STEPS}", f"hydra.sweep.dir={tmp_path / 'sweep'}",
        f"output={tmp_path}/lr_${{optim.lr}}", "optim.lr=1e-4,2e-4",
    ]  # fmt: skip
    done = subprocess.run(started, env=environment(), capture_output=True, text=True, timeout=LIMIT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [two_losses(tmp_path / f"lr_{rate}") for rate in ("0.0001", "0.0002")]
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]  # the first step is taken from the same weights


# -------------------------------------------------------------------------------------- what is seen and said


@pytest.mark.parametrize(
    ("given", "nodes"),
    [({}, 1), ({"SLURM_NNODES": "3"}, 3), ({"GROUP_WORLD_SIZE": "2", "SLURM_NNODES": "3"}, 2)],
)
def test_nodes_are_counted_by_the_launcher(given: dict[str, str], nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NNODES", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    own = validate(
        TrainSettings, compose("train", [*SMALLEST, "data.shards=x", "output=y", "trainer=ddp_nodes"])
    )  # fmt: skip
    assert own.trainer.num_nodes == nodes and own.trainer.devices == "auto" and own.trainer.accelerator == "gpu"


def test_ddp_waits_as_long_as_it_is_told() -> None:
    strategy = make_strategy("ddp_find_unused_parameters_true", 0.5)
    assert isinstance(strategy, DDPStrategy) and make_strategy("auto", 0.5) == "auto"


def test_local_ranks_follow_from_the_devices_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    found = EnvironmentRanks(2)
    assert (found.global_rank(), found.local_rank(), found.world_size()) == (5, 1, 8)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert found.local_rank() == 0


def only(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    """An environment in which one launcher has spoken."""
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_ranks_that_do_not_know_where_rank_zero_is_are_told(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    assert len(launch_plugins(1)) == 1
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"WORLD_SIZE=2: {missing} must be given"):
        launch_plugins(1)


@pytest.mark.parametrize(
    ("given", "who"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, "by hand"),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
          "SLURM_NODEID": "0", "SLURM_JOB_NAME": "x"}, "srun"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_the_devices_are_refused_by_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], who: str
) -> None:
    only(monkeypatch, given)
    said = f"{who} started 4 rank.s., but trainer.devices=2 on trainer.num_nodes=1 make 2"
    with pytest.raises(UserError, match=said):
        make_trainer(settings("trainer.devices=2"), tmp_path, None, False)
    assert not list(tmp_path.iterdir())


def test_tasks_that_are_not_counted_by_node_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    with pytest.raises(UserError, match=r"Use `--ntasks-per-node=2` instead.*docs/how-to/slurm.md"):
        make_trainer(settings("trainer.devices=2"), tmp_path, None, False)


def test_a_gpu_that_is_not_here_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="medsam2 doctor"):
        make_trainer(settings("trainer.accelerator=gpu"), tmp_path, None, False)
