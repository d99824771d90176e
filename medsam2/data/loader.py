"""From the plan to PyTorch's `DataLoader`: a loader step is a number, and gives one rank's whole batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from medsam2.data.batch import ClipBatch
from medsam2.data.catalog import Catalog
from medsam2.data.entry import PlanEntry
from medsam2.data.plan import Plan
from medsam2.data.reader import BatchReader
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
        for kind in plan.streams:
            size, lanes = plan.batch_size(kind), plan.settings.lanes
            if size % (world * accumulate):
                raise ValueError(
                    f"a global batch of {size} {kind} does not split over {world} ranks "
                    f"and {accumulate} accumulated steps"
                )
            if size % lanes:
                raise UserError(
                    f"data.lanes={lanes} does not divide the global batch of {size} {kind}; "
                    "give the number of machines, or another divisor."
                )
        self.plan = plan
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.reader = BatchReader(plan.catalogs, plan.substitute)
        self.ahead = FetchAhead(self) if any(catalog.store.whole for catalog in plan.catalogs) else None

    def part(self, step: int) -> tuple[int, int, int]:
        """(optimiser step, part, parts) of a loader step of this rank: what `Plan.part` takes."""
        optimiser_step, accumulated = divmod(step, self.accumulate)
        return optimiser_step, accumulated * self.world + self.rank, self.world * self.accumulate

    def __getitem__(self, step: int) -> ClipBatch:
        if self.ahead is not None:
            self.ahead.from_step(step)
        place = self.part(step)
        return self.reader.read(self.plan.part(*place), place[0], self.plan.prompt_frame(place[0]))


class FetchAhead:
    """Tells the stores which shards the next loader steps need, each step looked up once in a process."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset
        self.steps = dataset.plan.settings.cache.ahead
        self._known: deque[tuple[int, list[tuple[int, str]]]] = deque()

    def from_step(self, step: int) -> None:
        """The shards of the `steps` loader steps after this one will be needed soon, the next first."""
        while self._known and self._known[0][0] <= step:
            self._known.popleft()
        if self._known and self._known[0][0] != step + 1:  # a jump: another epoch, or a resumed run
            self._known.clear()
        first = self._known[-1][0] + 1 if self._known else step + 1
        for later in range(first, step + 1 + self.steps):
            self._known.append((later, self._shards(later)))
        for index, catalog in enumerate(self.dataset.plan.catalogs):
            if catalog.store.whole:
                wanted = (shard for _, shards in self._known for folder, shard in shards if folder == index)
                catalog.store.fetch_ahead(list(dict.fromkeys(wanted)))

    def _shards(self, step: int) -> list[tuple[int, str]]:
        plan = self.dataset.plan
        found = plan.segments(*self.dataset.part(step))
        return [(folder, plan.catalogs[folder].text("shard", row)) for folder, row in found]


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

    def set_epoch(self, epoch: int) -> None:
        """The plan counts steps and needs no epoch."""


class StepLoader(DataLoader[ClipBatch]):
    """A `DataLoader` whose whole state is the trainer's step (Lightning asks loaders that can resume for it)."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: `StepSampler` asks for the step."""
