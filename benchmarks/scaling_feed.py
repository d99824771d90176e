"""A discrete-event simulation of machines that fetch what the plan needs ahead of it, as `medsam2.data` does.

What is fetched is called a shard here; where clips are read by range, it is the range of a clip.

Of each machine: a queue of wished shards in the order of the plan, so many connections as it has loader processes (each
has one thread that fetches), a cache that drops the least recently used shard first and never one that is wished, and
ranks that take a step when all shards of it are there. All machines take a step together, as DDP does.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PREFETCH = 4  # batches that each worker of a `DataLoader` reads ahead


@dataclass(frozen=True)
class Line:
    """A machine's way to its shards.

    Attributes:
        connections: downloads at once. connection, machine: bytes a second of one, and of all together.
        cache: bytes. ahead: loader steps that are wished.
        pause: seconds for which a download takes its connection beside the transfer of its bytes.
        most: downloads a second of the machine.
        keep: whether what was used stays in the cache.
    """

    connections: int
    connection: float
    machine: float
    cache: float
    ahead: int
    pause: float = 0.0
    most: float = math.inf
    keep: bool = True

    def seconds(self, size: float) -> float:
        """Of one download of `size` bytes while all connections are busy."""
        rate = min(self.connection, self.machine / self.connections)
        return max(self.pause + size / rate, self.connections / self.most)


@dataclass(frozen=True)
class Fed:
    """What a simulation found in the steps that count.

    Attributes:
        seconds: of all steps. stalled: share of them in which the GPUs waited for shards.
        first: seconds to the first batch. fetched: bytes that a machine fetched in a step.
        hits: share of wished shards that were in the cache.
    """

    seconds: float
    stalled: float
    first: float
    fetched: float
    hits: float


class Machine:
    """One machine; `shards(step)` are those that its ranks need in a step, `sizes` the bytes of every shard."""

    def __init__(self, shards: Callable[[int], list[int]], sizes: np.ndarray, line: Line) -> None:
        self.shards, self.sizes, self.line = shards, sizes, line
        self.wished: deque[tuple[int, list[int]]] = deque()
        self.needed: Counter[int] = Counter()  # by shard, in how many wished steps it stands
        self.ready: dict[int, float] = {}  # when a shard of the cache is, or will be, whole
        self.idle: OrderedDict[int, None] = OrderedDict()  # of the cache, what nobody wishes; least recently used first
        self.waiting: deque[int] = deque()  # wished, but without room
        self.free = [0.0] * line.connections
        self.used = self.fetched = 0.0
        self.asked = self.hits = 0

    def begin(self) -> None:
        """Wish the first steps."""
        for step in range(self.line.ahead):
            self._wish(step, 0.0)

    def until(self, now: float) -> float:
        """When the shards of the next step are there."""
        _, shards = self.wished[0]
        missing = [shard for shard in shards if shard not in self.ready]
        for shard in missing:
            self._fetch(shard, now, must=True)
        return max([now, *(self.ready[shard] for shard in shards)])

    def take(self, now: float) -> None:
        """The next step is read; another one is wished."""
        step, shards = self.wished.popleft()
        for shard in shards:
            self.needed[shard] -= 1
            if not self.needed[shard]:
                del self.needed[shard]
                self.idle[shard] = None
        while self.idle and not self.line.keep:
            self._drop(self.idle.popitem()[0])
        while self.waiting and self._fetch(self.waiting[0], now):
            self.waiting.popleft()
        self._wish(step + self.line.ahead, now)

    def _wish(self, step: int, now: float) -> None:
        shards = self.shards(step)
        self.wished.append((step, shards))
        for shard in shards:
            self.asked += 1
            self.hits += shard in self.ready or shard in self.needed
            self.idle.pop(shard, None)
            self.needed[shard] += 1
            if self.needed[shard] == 1 and (self.waiting or not self._fetch(shard, now)):
                self.waiting.append(shard)

    def _fetch(self, shard: int, now: float, must: bool = False) -> bool:
        """Put a download into the queue; False: there is no room, and it is not needed at once."""
        if shard in self.ready or shard not in self.needed:
            return True
        size = float(self.sizes[shard])
        while self.used + size > self.line.cache and self.idle:
            self._drop(self.idle.popitem(last=False)[0])
        if self.used + size > self.line.cache:
            if not must:
                return False
            self._drop_latest(size)
        start = max(now, heapq.heappop(self.free))
        end = start + self.line.seconds(size)
        heapq.heappush(self.free, end)
        self.ready[shard] = end
        self.used += size
        self.fetched += size
        return True

    def _drop_latest(self, size: float) -> None:
        """Of what is wished, what will be needed last makes room; what the next step needs stays, over the limit."""
        for _, shards in reversed(list(self.wished)[1:]):
            for shard in shards:
                if self.used + size <= self.line.cache:
                    return
                if shard in self.ready and shard not in self.wished[0][1]:
                    self._drop(shard)
                    self.waiting.append(shard)

    def _drop(self, shard: int) -> None:
        del self.ready[shard]
        self.used -= float(self.sizes[shard])


def feed(machines: list[Machine], steps: int, warm: int, step_seconds: float) -> Fed:
    """`steps` common steps of all machines, each of `step_seconds` and waiting; the first `warm` do not count."""
    for machine in machines:
        machine.begin()
    first = now = max(machine.until(0.0) for machine in machines)
    stalled, begun = 0.0, now
    for step in range(steps):
        if step == warm:
            stalled, begun = 0.0, now
            for machine in machines:
                machine.fetched, machine.asked, machine.hits = 0.0, 0, 0
        for machine in machines:
            machine.take(now)
        now += step_seconds
        there = max(machine.until(now) for machine in machines)
        stalled, now = stalled + there - now, there
    return Fed(
        now - begun,
        stalled / (now - begun),
        first,
        sum(machine.fetched for machine in machines) / len(machines) / (steps - warm),
        sum(machine.hits for machine in machines) / sum(machine.asked for machine in machines),
    )
