"""The ranks of torchrun or srun that share the cases of an evaluation. They meet twice: before and after the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from medsam2.errors import UserError

SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
"""Only srun sets it. SLURM_NTASKS also stands in a batch script, which is one process."""
MAX_WAIT = timedelta(hours=12)
"""How long ranks wait for one that is silent. One that ends is noticed at once."""


@dataclass(frozen=True)
class Rank:
    """One of `count` processes that share the cases.

    Attributes:
        index: 0 to count - 1; rank 0 writes the tables. local: its index on this machine, which picks the GPU.
        restarted: the launcher started the ranks again after a fault, so that finished cases are kept.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    restarted: bool = False

    @property
    def leads(self) -> bool:
        """Whether this rank writes the tables."""
        return self.index == 0


ALONE = Rank()


def find_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """The rank that torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS) gave to this process."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names, restarts = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "TORCHELASTIC_RESTART_COUNT"
    elif "SLURM_PROCID" in environment and SLURM_TASKS in environment:
        names, restarts = ("SLURM_PROCID", SLURM_TASKS, "SLURM_LOCALID"), "SLURM_RESTART_COUNT"
    else:
        return ALONE
    index, count, local = (int(environment.get(name, "0")) for name in names)
    return Rank(index, count, local, environment.get(restarts, "0") not in ("", "0"))


@contextmanager
def meeting_point(rank: Rank) -> Iterator[Callable[[], None]]:
    """Yields a function that returns once every rank has called it; with one rank it returns at once.

    Raises:
        UserError: (from the function) another rank has ended, or did not come within 12 hours.
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

    def meet() -> None:
        try:
            dist.monitored_barrier(timeout=MAX_WAIT)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"rank {rank.index}: another rank ended ({reason}). The same command with resume=true, on any "
                "number of ranks, does the missing cases."
            ) from None

    try:
        yield meet
    finally:
        dist.destroy_process_group()
