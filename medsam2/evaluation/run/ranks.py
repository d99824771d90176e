"""The ranks of torchrun or srun that share the cases of an evaluation, and the barrier between their steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from medsam2.errors import UserError

SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
"""Only srun sets it. SLURM_NTASKS is also set in a batch script, which is one process."""
MAX_WAIT = timedelta(hours=12)
"""How long ranks wait for a silent rank. A rank that exits is noticed at once."""


@dataclass(frozen=True)
class Rank:
    """One of `count` processes that share the cases.

    Attributes:
        index: 0 to count - 1; rank 0 writes the tables. local_index: its index on this machine, which selects the GPU.
        restarted: whether the launcher restarted the ranks after a failure; finished cases are then reused.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    restarted: bool = False

    @property
    def leads(self) -> bool:
        """Whether this rank writes the tables."""
        return self.index == 0


SINGLE_RANK = Rank()


def find_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """Read the rank of this process from the variables of torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID)."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names, restarts = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "TORCHELASTIC_RESTART_COUNT"
    elif "SLURM_PROCID" in environment and SLURM_TASKS in environment:
        names, restarts = ("SLURM_PROCID", SLURM_TASKS, "SLURM_LOCALID"), "SLURM_RESTART_COUNT"
    else:
        return SINGLE_RANK
    index, count, local = (int(environment.get(name, "0")) for name in names)
    return Rank(index, count, local, environment.get(restarts, "0") not in ("", "0"))


@contextmanager
def rank_barrier(rank: Rank) -> Iterator[Callable[[], None]]:
    """Yield a barrier: a function that returns once every rank has called it; with one rank it returns at once.

    Raises:
        UserError: (from the barrier) another rank has ended, or did not call it within 12 hours.
    """
    if rank.count == 1:
        yield lambda: None
        return
    import torch.distributed as dist

    if "MASTER_ADDR" not in os.environ:  # torchrun sets it, srun does not
        from lightning.fabric.plugins.environments import SLURMEnvironment

        cluster = SLURMEnvironment()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
    dist.init_process_group("gloo", rank=rank.index, world_size=rank.count, timeout=MAX_WAIT)

    def barrier() -> None:
        try:
            dist.monitored_barrier(timeout=MAX_WAIT)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"rank {rank.index}: another rank ended ({reason}). Run the same command with resume=true, on any "
                "number of ranks, to evaluate the missing cases."
            ) from None

    try:
        yield barrier
    finally:
        dist.destroy_process_group()
