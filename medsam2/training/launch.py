"""How the processes of a run find each other, and what is said where devices and processes do not fit.

Lightning knows torchrun, SLURM's srun and the ranks that it starts itself. Ranks that something else started, each
with RANK, WORLD_SIZE and MASTER_ADDR in its environment, are what this file adds. Nobody else compares how many there
are with the devices that the configuration names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

from medsam2.errors import UserError
from medsam2.training.settings import TrainSettings

P = ParamSpec("P")
R = TypeVar("R")
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN, TORCHRUN, HAND = "srun", "torchrun", "RANK and WORLD_SIZE by hand"


class PlainEnvironment(TorchElasticEnvironment):
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT given by hand; LOCAL_RANK follows from the devices of a node.

    Args:
        devices: ranks of each node.
    """

    def __init__(self, devices: int) -> None:
        self.devices = devices

    def local_rank(self) -> int:
        given = os.environ.get("LOCAL_RANK")
        return int(given) if given is not None else self.global_rank() % self.devices

    def node_rank(self) -> int:
        return self.global_rank() // self.devices


def launched_by(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Who started this process as one of how many ranks; None for a process that starts the others itself."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return TORCHRUN, int(environment.get("WORLD_SIZE", "1"))
    if "SLURM_NTASKS" in environment:
        # Lightning leaves an interactive job alone
        interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
        return None if interactive else (SRUN, int(environment["SLURM_NTASKS"]))
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        return HAND, int(environment["WORLD_SIZE"])
    return None


def launch_plugins(settings: TrainSettings) -> list[ClusterEnvironment]:
    """What Lightning's Trainer is told about the launch: nothing where it sees by itself.

    Raises:
        UserError: as many ranks were started as there are no devices for, or they cannot know where rank 0 is.
    """
    from medsam2.training.auto_batch import number_of_ranks  # it takes steps, and with them half of this package

    found = launched_by(os.environ)
    if found is None:
        return []
    who, world = found
    own = settings.trainer
    expected = number_of_ranks(settings)
    if world != expected:
        raise UserError(
            f"{who} started {world} rank(s), but trainer.devices={own.devices} on trainer.num_nodes={own.num_nodes} "
            f"make {expected}: one process drives one device. Start as many (srun: --ntasks-per-node, torchrun: "
            "--nproc-per-node and --nnodes), or give trainer.devices= of a node and trainer.num_nodes=."
        )
    if who != HAND:
        return []
    missing = [name for name in NEEDED if name not in os.environ]
    if missing and world > 1:
        raise UserError(
            f"RANK={os.environ['RANK']} WORLD_SIZE={world}: {' and '.join(missing)} must be given too (the host of "
            "rank 0, and a free port on it); unset RANK and WORLD_SIZE for a run of one process."
        )
    return [PlainEnvironment(expected // own.num_nodes)]


def explain_launch(make: Callable[P, R]) -> Callable[P, R]:
    """A `UserError` where devices, nodes or the launch do not fit this machine, in the place of Lightning's errors."""

    @wraps(make)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return make(*args, **kwargs)
        except UserError:
            raise
        except MisconfigurationException as error:
            raise UserError(
                f"{_one_line(error)}. `medsam2 doctor` lists the devices; trainer=cpu needs none."
            ) from None
        except RuntimeError as error:
            if "--ntasks" not in str(error) or not SLURMEnvironment.detect():
                raise
            raise UserError(f"{_one_line(error)} (docs/slurm.md)") from None

    return wrapped


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
