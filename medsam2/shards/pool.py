"""Running one function over many cases: here, in processes of this machine, or on a Dask cluster, by one loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from medsam2.errors import UserError
from medsam2.shards.stage import Job

T = TypeVar("T")
BYTES_PER_WORKER = 32 << 20
AHEAD = 4
DASK_SECONDS = 20


@dataclass(frozen=True)
class Workers:
    """Who does the work: `count` processes of this machine, or the cluster behind the scheduler at `dask`."""

    count: int = 1
    dask: str | None = None


class Lost(Exception):
    """The process that worked on a case died."""


def run_all(
    function: Callable[[Job], T], jobs: Sequence[Job], workers: Workers, lost: Callable[[Job], T]
) -> Iterator[tuple[Job, T]]:
    """(job, result) in the order in which they are ready.

    A case whose worker dies is tried once more, alone; `lost` makes its result where it dies again.

    Raises:
        UserError: the scheduler cannot be reached, or its package is not installed.
    """
    if workers.dask:
        with _dask(workers.dask) as (executor, size):
            yield from _flow(executor, size, function, deque(jobs), lost)
        return
    count = useful_workers(jobs, workers.count)
    if count <= 1:
        for job in jobs:
            yield job, function(job)
        return
    waiting = deque(jobs)
    while waiting:
        suspects: list[Job] = []
        with _processes(count) as executor:
            yield from _flow(executor, count, function, waiting, None, suspects)
        for job in suspects:  # one of them killed the pool; each is tried alone, and the guilty one is known
            with _processes(1) as executor:
                yield from _flow(executor, 1, function, deque([job]), lost)


def useful_workers(jobs: Sequence[Job], workers: int) -> int:
    """At most `workers` processes, one for each 32 MB of sources: starting one costs as much as reading that."""
    size, most = 0, min(workers, len(jobs))
    for job in jobs:
        for path in job.ref.files:
            entries = path.iterdir() if path.is_dir() else [path]
            size += sum(entry.stat().st_size for entry in entries if entry.is_file())
        if size // BYTES_PER_WORKER + 1 >= most:
            return most
    return 1 + size // BYTES_PER_WORKER


def _flow(
    executor: Executor,
    size: int,
    function: Callable[[Job], T],
    waiting: deque[Job],
    lost: Callable[[Job], T] | None,
    suspects: list[Job] | None = None,
) -> Iterator[tuple[Job, T]]:
    """Keep a few jobs a worker in flight, never all; what flew when a worker died goes to `suspects`."""
    flying: dict[Future[T], Job] = {}
    while waiting or flying:
        try:
            while waiting and len(flying) < AHEAD * size:
                flying[executor.submit(partial(_alone, function), waiting[0])] = waiting.popleft()
        except BrokenProcessPool:
            pass  # the futures in flight say so too
        if not flying:
            return
        for future in wait(flying, return_when=FIRST_COMPLETED).done:
            job = flying.pop(future)
            try:
                yield job, _result(future)
            except Lost:
                if suspects is None:
                    assert lost is not None
                    yield job, lost(job)
                else:
                    suspects += [job, *flying.values()]
                    return


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except (BrokenProcessPool, CancelledError):
        raise Lost from None
    except Exception as error:
        if type(error).__name__ in ("KilledWorker", "WorkerDiedError", "FutureCancelledError"):  # distributed's
            raise Lost from None
        raise


@contextmanager
def _processes(count: int) -> Iterator[Executor]:
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _dask(address: str) -> Iterator[tuple[Executor, int]]:
    try:
        from distributed import Client
    except ImportError:
        raise UserError(f'--dask {address}: Dask is not installed; pip install "medsam2[dask]".') from None
    try:
        client: Any = Client(address, timeout=DASK_SECONDS)
    except (OSError, ValueError) as error:
        raise UserError(f"--dask {address}: no scheduler answers there ({error}); check address and network.") from None
    with client:
        size = sum(client.nthreads().values())
        if not size:
            raise UserError(f"--dask {address}: the scheduler has no workers; start some and run it again.")
        yield client.get_executor(retries=0, pure=False), size


def _alone(function: Callable[[Job], T], job: Job) -> T:
    """One thread a worker: the cases are what runs in parallel."""
    import cv2
    import SimpleITK as sitk

    cv2.setNumThreads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return function(job)
