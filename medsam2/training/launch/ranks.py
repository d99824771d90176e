"""Connect the processes of a run, and refuse a number of processes that does not fit the devices.

Lightning knows torchrun, SLURM's srun and the ranks that it starts itself. This file adds ranks that something else
started with RANK, WORLD_SIZE and MASTER_ADDR in their environment. It also compares the number of processes with the
configured devices, which Lightning does late or, for one device, not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import lightning as L
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, Strategy

from medsam2.errors import UserError

ENVIRONMENT_LAUNCH = "RANK and WORLD_SIZE by hand"


class EnvironmentRanks(TorchElasticEnvironment):
    """Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; LOCAL_RANK follows from the number of nodes."""

    def __init__(self, num_nodes: int) -> None:
        self.ranks_per_node = max(self.world_size() // num_nodes, 1)

    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", self.global_rank() % self.ranks_per_node))


def launcher() -> tuple[str, int] | None:
    """Return the program that started the ranks, and their number; None where Lightning starts them."""
    if TorchElasticEnvironment.detect():
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if SLURMEnvironment.detect():
        return "srun", int(os.environ["SLURM_NTASKS"])
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return ENVIRONMENT_LAUNCH, int(os.environ["WORLD_SIZE"])
    return None


def launch_plugins(num_nodes: int) -> list[ClusterEnvironment]:
    """Return the cluster environment for Lightning's Trainer; none where Lightning detects it.

    Raises:
        UserError: the ranks cannot know where rank 0 is.
    """
    launched = launcher()
    if launched is None or launched[0] != ENVIRONMENT_LAUNCH:
        return []
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and launched[1] > 1:
        raise UserError(
            f"RANK={os.environ['RANK']} WORLD_SIZE={os.environ['WORLD_SIZE']}: {' and '.join(missing)} must be given "
            "too (the host of rank 0, and a free port on it); unset RANK and WORLD_SIZE for a run of one process."
        )
    return [EnvironmentRanks(num_nodes)]


def make_strategy(name: str, timeout_minutes: float) -> str | Strategy:
    """Return the strategy for Lightning; DDP gets a timeout for its collectives."""
    if name not in ("ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"):
        return name
    timeout = timedelta(minutes=timeout_minutes)
    return DDPStrategy(find_unused_parameters=name.endswith("_true"), timeout=timeout)


def refuse_other_world_size(trainer: L.Trainer) -> None:
    """Compare how many processes were launched with how many the configuration needs.

    Raises:
        UserError: the two numbers differ.
    """
    launched, needed = launcher(), trainer.num_devices * trainer.num_nodes
    if launched is not None and launched[1] != needed:
        raise UserError(
            f"{launched[0]} started {launched[1]} rank(s), but trainer.devices={trainer.num_devices} on "
            f"trainer.num_nodes={trainer.num_nodes} make {needed}: one process drives one device. Start as many (srun: "
            "--ntasks-per-node, torchrun: --nproc-per-node and --nnodes), or give trainer.devices= of a node and "
            "trainer.num_nodes=."
        )


@contextmanager
def explain_launch_errors() -> Iterator[None]:
    """Raise a `UserError` instead of Lightning's errors where devices, nodes or the launch do not fit this machine."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"{_one_line(error)}. `medsam2 doctor` lists the devices; trainer=cpu needs none.") from None
    except RuntimeError as error:
        if "--ntasks" not in str(error) or not SLURMEnvironment.detect():
            raise
        raise UserError(f"{_one_line(error)} (docs/how-to/slurm.md)") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
