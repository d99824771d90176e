"""From the plan to PyTorch's `DataLoader`: a loader step is a number, and gives one rank's whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from medsam2.data.batch import ClipBatch
from medsam2.data.catalog import Catalog
from medsam2.data.plan import Plan
from medsam2.data.reader import BatchReader
from medsam2.data.stream import PlanEntry
from medsam2.errors import UserError


class StepDataset(Dataset[ClipBatch]):
    """Loader step -> the batch of one rank.

    Args:
        plan: its global batch is that of one optimiser step.
        rank, world: this process and how many there are.
        accumulate: loader steps of one optimiser step; a batch carries the optimiser step, so that what a batch
            shares is the same whether ranks or accumulation make up the global batch.
    """

    def __init__(self, plan: Plan, rank: int = 0, world: int = 1, accumulate: int = 1) -> None:
        self.plan = plan
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.reader = BatchReader(plan.catalogs, plan.substitute)

    def __getitem__(self, step: int) -> ClipBatch:
        optimiser_step, accumulated = divmod(step, self.accumulate)
        part = accumulated * self.world + self.rank
        entries = self.plan.part(optimiser_step, part, self.world * self.accumulate)
        return self.reader.read(entries, optimiser_step, self.plan.prompt_frame(optimiser_step))


class FixedDataset(Dataset[ClipBatch]):
    """Batches of fixed entries: item i holds the entries from i * size on."""

    def __init__(self, catalogs: Sequence[Catalog], entries: Sequence[PlanEntry], size: int) -> None:
        self.entries = tuple(entries)
        self.size = size
        self.reader = BatchReader(catalogs, None)

    def __len__(self) -> int:
        return -(-len(self.entries) // self.size)

    def __getitem__(self, index: int) -> ClipBatch:
        return self.reader.read(self.entries[index * self.size : (index + 1) * self.size], index)


class StepSampler(DistributedSampler[int]):
    """The loader steps that are left, asked for when iteration begins.

    It is a `DistributedSampler` in name only: Lightning would replace any other sampler on several ranks, and the
    steps of the plan are already split over them.

    Args:
        length: loader steps in all.
        next_step: the next loader step.
    """

    def __init__(self, length: int, next_step: Callable[[], int]) -> None:
        self.length = length
        self.next_step = next_step

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.next_step(), self.length))

    def __len__(self) -> int:
        return self.length


class StepLoader(DataLoader[ClipBatch]):
    """A `DataLoader` whose whole state is the trainer's step (Lightning asks loaders that can resume for it)."""

    def __iter__(self) -> Iterator[ClipBatch]:  # type: ignore[override]
        """The batches; an error that a worker met is the one sentence that it is, without the worker's traceback."""
        try:
            yield from super().__iter__()
        except UserError as error:
            lines = str(error).strip().splitlines()
            raise UserError(lines[-1].partition("Error: ")[2] if lines[0].startswith("Caught ") else error) from None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: `StepSampler` asks for the step."""
