"""The throughput of a cluster from the costs of a clip: seconds of a step, and its limits. Does not import medsam2."""

from __future__ import annotations

import math
from dataclasses import dataclass

BUCKET_BYTES = 25e6  # DDP sends gradients in parts of this size while the backward pass goes on
HIDDEN = 0.6  # share of a step's computation behind which gradients can be sent


@dataclass(frozen=True)
class Costs:
    """Costs that make up a step. "measured": by benchmarks of this project; all others are assumptions.

    Attributes:
        gpu_s: seconds of forward, backward and update per clip on one GPU.
        object_share: share of `gpu_s` that grows with the number of objects.
        decode_s: CPU seconds per clip in a loader's worker (measured). cores: cores per machine for workers.
        gradient_bytes: bytes sent in each step (measured: 4 bytes per parameter).
        inside, between: bytes per second of an all-reduce inside a machine, and of the network between machines.
        latency: seconds per hop between machines.
        checkpoint_s: seconds that all ranks wait for a checkpoint (measured). checkpoint_every: steps.
        connection, bucket: bytes per second of one download, and of the bucket for all machines together.
        workers: loader processes per rank, each of which requests the ranges of one batch at a time.
        request_s: seconds until a request for a range is answered. requests: number per second that the bucket answers.
        request_cpu_s: CPU seconds for a clip's range in a worker, without decoding (measured).
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
    """Seconds of the parts of a step without waiting for data."""

    compute: float
    straggler: float
    exchange: float
    checkpoint: float

    @property
    def seconds(self) -> float:
        return self.compute + self.straggler + self.exchange + self.checkpoint


def step(costs: Costs, ranks: int, per_node: int, clips: int, most_objects: float) -> Step:
    """Return a step of `ranks` GPUs with `clips` clips each.

    Args:
        most_objects: the largest number of objects of a rank, over the mean.
    """
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
    """Seconds of an all-reduce: a ring inside each machine, then one over machines (bandwidth), in trees (latency)."""
    own, nodes = min(ranks, per_node), -(-ranks // per_node)
    seconds = 2 * (own - 1) / own * size / costs.inside
    if nodes > 1:
        hops = 2 * math.ceil(math.log2(nodes)) * math.ceil(size / BUCKET_BYTES)
        seconds += 2 * (nodes - 1) / nodes * size / costs.between + hops * costs.latency
    return seconds


def limits(
    costs: Costs, ranks: int, per_node: int, rate: float, clip_bytes: float, clip_requests: float, clips: int
) -> dict[str, float]:
    """Clips per second that each resource would allow; a worker requests a batch of `clips`, waits, and decodes it.

    Args:
        rate: clips per second of the GPUs without waiting. clip_bytes, clip_requests: per clip, mean over all machines.
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
    """Seconds from the request for a clip's range to the decoded batch of `clips` that contains it."""
    speed = min(costs.connection, costs.between / connections)
    return costs.request_s + clip_bytes / speed + costs.batch_cpu(clips)
