"""Map a function over many cases: in this process, in processes of this machine, or on a Dask cluster.

Process pools and clusters are both `concurrent.futures` executors and share one loop. It limits the number of cases in
flight, so that 100,000 cases do not fill the memory. A case that kills its worker fails alone.
(joblib has the same two backends, but joblib 1.6 hangs on Dask when a worker is killed.)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from medsam2.cases.case import CaseRef
from medsam2.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

CASES_PER_PROCESS = 2
"""Cases in flight per process: one runs, the next waits."""
MAX_CASES_ON_DASK = 1000
"""Cases in flight on a cluster; its scheduler distributes them."""
BYTES_PER_WORKER = 32 << 20
CONNECT_SECONDS = 20.0
CLOSE_SECONDS = 3.0

WORKER_KILLED = "its worker was killed, probably because memory ran out; use fewer --workers, or leave the case out."


@dataclass(frozen=True)
class Workers:
    """Where cases run.

    Attributes:
        processes: number of processes on this machine; 0 runs the cases in this process.
        dask: address of a Dask scheduler whose workers are used instead.
    """

    processes: int = 0
    dask: str | None = None

    def run(self, function: Callable[[T], R], cases: Iterable[T]) -> Generator[tuple[T, R | None], None, None]:
        """Yield (case, function(case)) as results arrive; None for a case that killed its worker twice.

        Raises:
            UserError: the cluster cannot be reached or is lost.
        """
        if self.dask:
            yield from _run_on_dask(function, cases, self.dask)
        elif self.processes:
            yield from _Pool(_processes, self.processes, CASES_PER_PROCESS, BrokenProcessPool).run(function, cases)
        else:
            for case in cases:
                yield case, function(case)


def choose_workers(refs: Sequence[CaseRef], max_processes: int, dask: str | None = None) -> Workers:
    """Choose one process per 32 MiB of source files, since starting a process takes as long as reading these.

    Smaller data are read in this process. A case that kills it would end the command, but small files do not.
    """
    if dask:
        return Workers(dask=dask)
    size = sum(_size(path) for ref in refs for path in ref.files)
    return Workers(min(max_processes, len(refs), -(-size // BYTES_PER_WORKER)) if size >= BYTES_PER_WORKER else 0)


def _size(path: Path) -> int:
    try:
        return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    except OSError:  # reading the case reports the error with a better message
        return 0


@dataclass(frozen=True)
class _Pool:
    """Run cases on an executor, and start another when a worker dies.

    Attributes:
        open: opens an executor with the given number of workers. count: number of workers.
        cases_per_worker: maximum number of submitted cases per worker.
        worker_died: the exception of a case whose worker died; every case in flight may get it.
    """

    open: Callable[[int], AbstractContextManager[Executor]]
    count: int
    cases_per_worker: int
    worker_died: type[Exception]

    def run(self, function: Callable[[T], R], cases: Iterable[T]) -> Generator[tuple[T, R | None], None, None]:
        waiting = deque(cases)
        while waiting:
            for suspect in (yield from self._run_until_death(function, waiting, self.count)):
                # Only a run alone shows which of the cases in flight killed the worker.
                if (yield from self._run_until_death(function, deque([suspect]), 1)):
                    yield suspect, None

    def _run_until_death(
        self, function: Callable[[T], R], waiting: deque[T], count: int
    ) -> Generator[tuple[T, R | None], None, list[T]]:
        """Take cases off `waiting` and yield their results; returns the cases in flight when a worker died."""
        lost: list[T] = []
        pending: dict[Future[R], T] = {}
        with self.open(count) as executor:
            while pending or (waiting and not lost):
                while waiting and not lost and len(pending) < count * self.cases_per_worker:
                    case = waiting.popleft()
                    try:
                        pending[executor.submit(function, case)] = case
                    except self.worker_died:
                        lost.append(case)
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    case = pending.pop(future)
                    if isinstance(future.exception(), self.worker_died):
                        lost.append(case)
                    else:
                        yield case, future.result()
        return lost


@contextmanager
def _processes(count: int) -> Iterator[Executor]:
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Use one thread per worker, since cases run in parallel; leave Ctrl-C to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _use_one_thread()


def _exit_with_parent() -> None:
    """Exit when the parent process is killed: an orphaned worker would write beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _use_one_thread() -> None:
    import cv2
    import SimpleITK as sitk

    cv2.setNumThreads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _run_on_dask(
    function: Callable[[T], R], cases: Iterable[T], address: str
) -> Generator[tuple[T, R | None], None, None]:
    with _connect(address) as client:
        from distributed import KilledWorker

        @contextmanager
        def cluster(_: int) -> Iterator[Executor]:
            executor = client.get_executor(pure=False)
            try:
                yield executor
            finally:
                executor.shutdown(wait=False)  # an incomplete case is staged again by the next run

        try:
            pool = _Pool(cluster, 1, MAX_CASES_ON_DASK, KilledWorker)
            yield from pool.run(partial(run_exclusively, function), cases)
        except Exception as error:
            if isinstance(error, CancelledError) or type(error).__module__.startswith("distributed."):
                raise UserError(
                    f"--dask {address}: the scheduler is lost ({type(error).__name__}); run the same command again: "
                    "finished cases are reused."
                ) from None
            raise


@contextmanager
def _connect(address: str) -> Iterator[Any]:
    """Connect to the Dask scheduler at `address` and wait for a worker.

    Raises:
        UserError: Dask is not installed, or no scheduler or no worker answers in time.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UserError('--dask needs the package distributed: pip install "medsam2[dask]".') from None
    client = None
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TypeError) as error:  # OSError: a TimeoutError is one
        if client:
            client.close(timeout=CLOSE_SECONDS)
        raise UserError(
            f"--dask {address}: no scheduler {'with workers ' if client else ''}answers ({error}). Give the address "
            f"that `dask scheduler` prints, and start workers with `dask worker {address} --nthreads 1`."
        ) from None
    try:
        yield client
    finally:
        client.close(timeout=CLOSE_SECONDS)


_CASE_LOCK = threading.Lock()


def run_exclusively(function: Callable[..., R], *args: Any) -> R:
    """Call `function` while no other thread of this Dask worker reads a case."""
    with _CASE_LOCK:
        _use_one_thread()
        return function(*args)
