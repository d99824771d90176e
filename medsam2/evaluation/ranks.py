"""Which process does which cases: ranks of a launcher, and worker processes of this machine.

Ranks never talk to each other. A case is a file in `parts/` (`parts.py`), so a shared folder is all that they need:
each rank writes the parts of its own cases, and rank 0 makes the tables when all parts are there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medsam2.errors import UserError

SLURM_TASKS = (
    "SLURM_STEP_NUM_TASKS"  # set by srun alone; SLURM_NTASKS also stands in a batch script, which is one process
)


@dataclass(frozen=True)
class Rank:
    """One of `count` processes that share the cases.

    Attributes:
        index: 0 to count - 1; rank 0 gathers. local: index on its machine, which picks the GPU.
        launch: equal for all ranks that were started together, so that none takes an earlier run's folder for theirs.
        again: the launcher started the ranks once more after a fault; what is finished is kept.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    launch: str = ""
    again: bool = False

    @property
    def leads(self) -> bool:
        """Whether this rank gathers."""
        return self.index == 0


ALONE = Rank()


def find_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """The rank that torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS) gave to this process.

    Raises:
        UserError: variables that are no numbers, or a rank that is not below the number of ranks.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        launch = [environment.get(f"TORCHELASTIC_{part}", "") for part in ("RUN_ID", "RESTART_COUNT")]
        launch += [environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
        again = environment.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    elif "SLURM_PROCID" in environment and SLURM_TASKS in environment:
        names = ("SLURM_PROCID", SLURM_TASKS, "SLURM_LOCALID")
        launch = [environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
        again = environment.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    else:
        return ALONE
    index, count, local = (_number(environment, name) for name in names)
    if not 0 <= index < count:
        raise UserError(f"{names[0]}={index} is not below {names[1]}={count}; start the ranks with torchrun or srun.")
    return Rank(index, count, local, "/".join(launch), again)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "0")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text} is no number; start the ranks with torchrun or srun.") from None


def share(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The cases of each of `count` ranks, in ascending order: largest first, each to the rank with the least so far.

    Every rank computes the same shares from the same sizes, whatever is finished already.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for number in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = min(range(count), key=lambda rank: (loads[rank], rank))
        shares[least].append(number)
        loads[least] += max(sizes[number], 1)
    return [sorted(numbers) for numbers in shares]
