"""A discrete-event simulation of machines that read the clips of the plan by range, as `medsam2.data` does.

A machine has a queue of clips in the order of the plan, as many connections as its loader processes have clips in a
batch, and ranks that take a step when all clips of the step have arrived. All machines take a step together, as in DDP.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PREFETCH = 4  # batches that each worker of a `DataLoader` prefetches


@dataclass(frozen=True)
class Line:
    """The connection of a machine to the bucket.

    Attributes:
        connections: number of simultaneous requests. connection, machine: bytes per second of one, and of all together.
        ahead: steps whose clips are requested before they are needed.
        pause: seconds that a request occupies its connection in addition to the transfer.
        most: largest number of clips per second of the machine.
    """

    connections: int
    connection: float
    machine: float
    ahead: int
    pause: float = 0.0
    most: float = math.inf

    def seconds(self, size: float) -> float:
        """Seconds for one clip of `size` bytes while all connections are busy."""
        rate = min(self.connection, self.machine / self.connections)
        return max(self.pause + size / rate, self.connections / self.most)


@dataclass(frozen=True)
class Fed:
    """The result of a simulation, without its first steps.

    Attributes:
        seconds: of all steps. stalled: share of them in which the GPUs waited for clips.
        first: seconds to the first batch. fetched: bytes that a machine fetched in a step.
    """

    seconds: float
    stalled: float
    first: float
    fetched: float


class Machine:
    """One machine; `clips(step)` are the clips of its ranks in a step, and `sizes` the bytes of each clip."""

    def __init__(self, clips: Callable[[int], list[int]], sizes: np.ndarray, line: Line) -> None:
        self.clips, self.sizes, self.line = clips, sizes, line
        self.ready: deque[float] = deque()  # arrival times of the clips of each requested step
        self.free = [0.0] * line.connections
        self.step = 0
        self.fetched = 0.0

    def begin(self) -> None:
        """Request the first steps."""
        for _ in range(self.line.ahead):
            self._request(0.0)

    def until(self, now: float) -> float:
        """Return the time when the clips of the next step have arrived."""
        return max(now, self.ready[0])

    def take(self, now: float) -> None:
        """Take the next step and request another one."""
        self.ready.popleft()
        self._request(now)

    def _request(self, now: float) -> None:
        last = now
        for clip in self.clips(self.step):
            size = float(self.sizes[clip])
            end = max(now, heapq.heappop(self.free)) + self.line.seconds(size)
            heapq.heappush(self.free, end)
            last = max(last, end)
            self.fetched += size
        self.ready.append(last)
        self.step += 1


def feed(machines: list[Machine], steps: int, warm: int, step_seconds: float) -> Fed:
    """Simulate `steps` common steps of `step_seconds` each plus waiting; the first `warm` do not count."""
    for machine in machines:
        machine.begin()
    first = now = max(machine.until(0.0) for machine in machines)
    stalled, begun = 0.0, now
    for step in range(steps):
        if step == warm:
            stalled, begun = 0.0, now
            for machine in machines:
                machine.fetched = 0.0
        for machine in machines:
            machine.take(now)
        now += step_seconds
        there = max(machine.until(now) for machine in machines)
        stalled, now = stalled + there - now, there
    fetched = sum(machine.fetched for machine in machines) / len(machines) / (steps - warm)
    return Fed(now - begun, stalled / (now - begun), first, fetched)
