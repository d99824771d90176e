"""From costs of a clip to what a cluster yields: seconds of a step, and what limits it. No import of the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

BUCKET_BYTES = 25e6  # DDP sends gradients in parts of this size while the backward pass goes on
HIDDEN = 0.6  # share of a step's computation behind which gradients can be sent


@dataclass(frozen=True)
class Costs:
    """What a step is made of; "measured" ones are of this project's benchmarks, the others are assumptions.

    Attributes:
        gpu_s: seconds of forward, backward and update of a clip on one GPU.
        object_share: share of `gpu_s` that grows with the number of objects.
        decode_s: CPU seconds of a clip in a loader's worker (measured). cores: of a machine, for workers.
        gradient_bytes: sent in each step (measured: 4 bytes a parameter).
        inside, between: bytes a second of an all-reduce inside a machine, and of a machine's way to the others.
        latency: seconds of one hop between machines.
        checkpoint_s: seconds that all ranks wait for one (measured). checkpoint_every: steps.
        connection, bucket: bytes a second of one download, and of the bucket for all machines together.
        workers: loader processes of a rank, each with the ranges of one batch under way.
        request_s: seconds until a request for a range is answered. requests: a second that the bucket answers.
        request_cpu_s: CPU seconds of a clip's range in a worker, beside decoding (measured).
    """

    gpu_s: float = 0.06
    object_share: float = 0.4
    decode_s: float = 0.0055
    cores: int = 64
    gradient_bytes: float = 156e6
    inside: float = 200e9
    between: float = 12.5e9
    latency: float = 30e-6
    checkpoint_s: float = 3.0
    checkpoint_every: int = 1000
    connection: float = 0.1e9
    bucket: float = 100e9
    workers: int = 2
    request_s: float = 0.05
    requests: float = 5500.0
    request_cpu_s: float = 0.0015

    def batch_cpu(self, clips: int) -> float:
        """CPU seconds of a worker for a batch of `clips` that it reads by range."""
        return clips * (self.decode_s + self.request_cpu_s)


@dataclass(frozen=True)
class Step:
    """Seconds of a step's parts when no data is waited for."""

    compute: float
    straggler: float
    exchange: float
    checkpoint: float

    @property
    def seconds(self) -> float:
        return self.compute + self.straggler + self.exchange + self.checkpoint


def step(costs: Costs, ranks: int, per_node: int, clips: int, most_objects: float) -> Step:
    """One step of `ranks` GPUs with `clips` clips each; `most_objects`: the fullest rank's objects over the mean."""
    compute = clips * costs.gpu_s
    exchange = all_reduce(costs, costs.gradient_bytes, ranks, per_node)
    last = all_reduce(costs, min(BUCKET_BYTES, costs.gradient_bytes), ranks, per_node)
    return Step(
        compute,
        compute * costs.object_share * (most_objects - 1),
        max(last, exchange - HIDDEN * compute),
        costs.checkpoint_s / costs.checkpoint_every,
    )


def all_reduce(costs: Costs, size: float, ranks: int, per_node: int) -> float:
    """A ring inside each machine, then one over the machines (bandwidth), in trees (latency)."""
    own, nodes = min(ranks, per_node), -(-ranks // per_node)
    seconds = 2 * (own - 1) / own * size / costs.inside
    if nodes > 1:
        hops = 2 * math.ceil(math.log2(nodes)) * math.ceil(size / BUCKET_BYTES)
        seconds += 2 * (nodes - 1) / nodes * size / costs.between + hops * costs.latency
    return seconds


def limits(
    costs: Costs, ranks: int, per_node: int, rate: float, clip_bytes: float, clip_requests: float, clips: int
) -> dict[str, float]:
    """Clips a second that each resource alone would allow; a worker asks for a batch of `clips`, waits, and decodes it.

    Args:
        rate: of the GPUs with all data at hand. clip_bytes, clip_requests: of a clip, on average of all machines.
    """
    nodes, own = -(-ranks // per_node), min(ranks, per_node)
    seconds = clip_seconds(costs, clip_bytes, own * costs.workers * clips, clips)
    return {
        "GPUs": rate,
        "decoding": nodes * min(costs.cores, own * costs.workers) / (costs.decode_s + costs.request_cpu_s),
        "machine's network": nodes * costs.between / clip_bytes,
        "bucket": costs.bucket / clip_bytes,
        "workers that wait": ranks * costs.workers * clips / seconds,
        "bucket's requests": costs.requests / clip_requests,
    }


def clip_seconds(costs: Costs, clip_bytes: float, connections: int, clips: int) -> float:
    """From the request for a clip's range to the decoded batch of `clips` that it is in."""
    speed = min(costs.connection, costs.between / connections)
    return costs.request_s + clip_bytes / speed + costs.batch_cpu(clips)
