"""A function over many cases: in this process, in processes of this machine, or on a Dask cluster.

All three are `concurrent.futures` executors, and `run_all` is the one loop over them. It has a bounded number of cases
in flight, so that 100,000 of them do not fill the memory, and a case that kills its worker costs that case alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from medsam2.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

IN_FLIGHT = 2  # cases submitted a worker: the next one waits there when a worker is done
DEATHS = 5  # so many cases in a row that kill their worker are no fault of the cases
BYTES_PER_WORKER = 32 << 20
CONNECT_SECONDS = 20.0
CLOSE_SECONDS = 3.0
WATCH_SECONDS = 15.0
WORKERLESS_SECONDS = 300.0


class Workers(Protocol):
    """What runs cases.

    Attributes:
        lost: exceptions that mean that a worker died under a case. notes: what the user should know of them.
    """

    lost: tuple[type[BaseException], ...]
    notes: tuple[str, ...]

    def opened(self, alone: bool) -> AbstractContextManager[Executor]:
        """An executor; `alone` asks for one that endangers no other case."""

    def in_flight(self) -> int:
        """How many cases may be submitted at once."""

    def check(self) -> None:
        """Called while nothing happens; raises `UserError` where nothing will."""

    def failure(self, error: BaseException) -> BaseException:
        """What to raise for an exception that is not of a case."""


@contextmanager
def open_workers(count: int, dask: str | None = None) -> Iterator[Workers]:
    """`count` processes of this machine (0: this process), or whatever the Dask scheduler at the address has.

    Raises:
        UserError: Dask is not installed, or no scheduler or no worker answers.
    """
    if dask is not None:
        with _connected(dask) as client:
            yield _Dask(client, dask)
    else:
        yield _Processes(count) if count else _Here()


def run_all(
    function: Callable[[T], R], tasks: Iterable[T], workers: Workers
) -> Generator[tuple[T, R | None], None, None]:
    """(task, function(task)) in the order in which they are ready; None where the task killed its worker, twice.

    Which of the cases in flight killed a worker cannot be told: they are all run again, one after the other.

    Raises:
        UserError: the workers are gone, or die whatever they are given.
    """
    waiting = deque(tasks)
    deaths = 0
    while waiting:
        left = len(waiting)
        lost = yield from _run(function, waiting, workers, alone=False)
        for task in lost:
            again = yield from _run(function, deque([task]), workers, alone=True)
            deaths = deaths + 1 if again else 0
            if deaths == DEATHS:
                raise UserError(
                    f"{DEATHS} cases in a row killed the process that read them: there is too little memory for any "
                    "of them, or processes cannot be started here (a script that calls this needs "
                    '`if __name__ == "__main__":`). Finished cases are kept.'
                )
            if again:
                yield task, None
        if waiting and len(waiting) == left:
            raise UserError("processes cannot be started here; run it with --workers 1. Finished cases are kept.")


def _run(
    function: Callable[[T], R], waiting: deque[T], workers: Workers, alone: bool
) -> Generator[tuple[T, R | None], None, list[T]]:
    """Take tasks off `waiting` and yield their results, until there are none or the pool breaks; returns the lost."""
    lost: list[T] = []
    pending: dict[Future[R], T] = {}
    broken = False
    with workers.opened(alone) as executor:
        while True:
            most = 1 if alone else workers.in_flight()
            while waiting and not broken and len(pending) < most:
                try:
                    future = executor.submit(function, waiting[0])
                except workers.lost:
                    broken = True
                    break
                pending[future] = waiting.popleft()
            if not pending:
                return lost
            done = wait(pending, WATCH_SECONDS, FIRST_COMPLETED).done
            if not done:
                workers.check()
            for future in [f for f in pending if f in done]:
                task = pending.pop(future)
                try:
                    result = future.result()
                except workers.lost:
                    lost.append(task)
                except Exception as error:
                    told = workers.failure(error)
                    if told is error:
                        raise
                    raise told from None
                else:
                    yield task, result


def useful_workers(sources: Sequence[Iterable[Path]], most: int) -> int:
    """At most `most` processes, one for each 32 MB of sources: starting one costs as much as reading that.

    0, this process itself, for less: it would not survive a case that kills it, but so little data does not.

    Args:
        sources: files and folders of each case.
    """
    size, most = 0, min(most, len(sources))
    for files in sources:
        for path in files:
            try:
                entries = path.iterdir() if path.is_dir() else [path]
                size += sum(entry.stat().st_size for entry in entries if entry.is_file())
            except OSError:
                continue  # whoever reads the case says it better
        if size >= BYTES_PER_WORKER and 1 + size // BYTES_PER_WORKER >= most:
            return most
    return 0 if size < BYTES_PER_WORKER else 1 + size // BYTES_PER_WORKER


class _Here:
    """This process: for little data."""

    lost: tuple[type[BaseException], ...] = ()
    notes: tuple[str, ...] = ()

    def opened(self, alone: bool) -> AbstractContextManager[Executor]:
        return nullcontext(_InProcess())

    def in_flight(self) -> int:
        return 1

    def check(self) -> None:
        pass

    def failure(self, error: BaseException) -> BaseException:
        return error


class _InProcess(Executor):
    """Runs a task where it is submitted."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Processes:
    """Processes of this machine, one case each at a time."""

    lost: tuple[type[BaseException], ...] = (BrokenProcessPool,)
    notes: tuple[str, ...] = ()

    def __init__(self, count: int) -> None:
        self.count = count

    @contextmanager
    def opened(self, alone: bool) -> Iterator[Executor]:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1 if alone else self.count, mp_context=context, initializer=_start_worker)
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def in_flight(self) -> int:
        return IN_FLIGHT * self.count

    def check(self) -> None:
        pass

    def failure(self, error: BaseException) -> BaseException:
        return error


def _start_worker() -> None:
    """One thread a worker, since the cases are what runs in parallel; Ctrl-C is for the parent to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _single_thread()


def _end_with_parent() -> None:
    """A parent that is killed takes its workers along: they would go on writing beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _single_thread() -> None:
    import cv2
    import SimpleITK as sitk

    cv2.setNumThreads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """A client of the Dask scheduler at `address` with at least one worker.

    Raises:
        UserError: Dask is not installed, or no scheduler or no worker answers in time.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UserError('--dask needs the package distributed: pip install "medsam2[dask]".') from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--dask {address}: no scheduler answers ({error}); give the address that `dask scheduler` prints, e.g. "
            "tcp://10.0.0.5:8786."
        ) from None
    try:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise UserError(
                f"--dask {address}: the scheduler has no worker; start some with `dask worker {address} --nworkers N "
                "--nthreads 1`."
            ) from None
        yield client
    finally:
        client.close(timeout=CLOSE_SECONDS)


class _Dask:
    """The workers of a Dask scheduler, one case a worker process at a time, however many threads it has."""

    def __init__(self, client: Any, address: str) -> None:
        from distributed import KilledWorker

        self.client = client
        self.address = address
        self.lost: tuple[type[BaseException], ...] = (KilledWorker,)
        self.notes: tuple[str, ...] = ()
        self.workerless_since: float | None = None
        threads = max(client.nthreads().values())
        if threads > 1:
            self.notes = (
                f"its workers have up to {threads} threads, of which one reads: start more workers with --nthreads 1.",
            )

    @contextmanager
    def opened(self, alone: bool) -> Iterator[Executor]:
        executor = self.client.get_executor(pure=False)
        try:
            yield _Exclusive(executor)
        finally:
            # what still runs is given up: a staged case is whole or made again
            executor.shutdown(wait=False)

    def in_flight(self) -> int:
        return IN_FLIGHT * max(1, self._count())

    def check(self) -> None:
        if self._count():
            self.workerless_since = None
            return
        now = time.monotonic()
        self.workerless_since = self.workerless_since or now
        if now - self.workerless_since > WORKERLESS_SECONDS:
            raise UserError(
                f"--dask {self.address}: it has had no worker for {WORKERLESS_SECONDS:.0f} s; finished cases are kept."
            )

    def failure(self, error: BaseException) -> BaseException:
        if isinstance(error, CancelledError) or type(error).__module__.startswith("distributed."):
            return UserError(
                f"--dask {self.address}: the scheduler is lost ({type(error).__name__}); run the same command again: "
                "finished cases are kept."
            )
        return error

    def _count(self) -> int:
        try:
            return len(self.client.nthreads())
        except (OSError, CancelledError):
            raise self.failure(CancelledError()) from None


class _Exclusive(Executor):
    """Submits to another executor what then runs alone in its process."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        return self.executor.submit(partial(exclusively, fn), *args, **kwargs)


_ONE_CASE = threading.Lock()


def exclusively(function: Callable[..., R], *args: Any) -> R:
    """`function` while no other case is read in this process: its memory is bounded by one case."""
    with _ONE_CASE:
        _single_thread()
        return function(*args)
