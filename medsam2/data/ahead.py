"""One thread a process that fetches what will be needed soon."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds for which a name that failed is left alone, though it is wished again with every step."""


class AheadThread:
    """Fetches wished names in order, in a daemon thread that lives while there are wishes.

    Only the latest wishes count. An error is logged and forgotten: who needs the name will meet it again.
    Picklable, and usable after a fork; the wishes stay behind.

    Args:
        missing: those of all wished names that have to be fetched; it may note that the others are wished.
        fetch: fetches one name, and may take as long as it likes; False: no room for more.
    """

    def __init__(self, missing: Callable[[Sequence[str]], Sequence[str]], fetch: Callable[[str], bool]) -> None:
        self._missing = missing
        self._fetch = fetch
        self.begin()
        _all.add(self)

    def __reduce__(self) -> tuple[type[AheadThread], tuple[object, ...]]:
        return AheadThread, (self._missing, self._fetch)

    def begin(self) -> None:
        """Forget everything, the thread too."""
        self._lock = threading.Lock()
        self._wishes: tuple[str, ...] = ()
        self._running = False
        self._failed: dict[str, float] = {}

    def wish(self, names: Sequence[str]) -> None:
        """Fetch these next, the first first, and nothing else that was wished before."""
        with self._lock:
            self._wishes = tuple(dict.fromkeys(names))
            if not self._wishes or self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name="fetch shards ahead", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                wishes = self._wishes
                if not wishes:
                    self._running = False
                    return
            try:
                self._serve(wishes)
            except Exception as error:  # whatever it is, it must not end the thread
                _report(error)
            with self._lock:
                if self._wishes is wishes:
                    self._wishes = ()

    def _serve(self, wishes: tuple[str, ...]) -> None:
        for name in self._missing(wishes):
            if self._wishes is not wishes:  # newer ones have come
                return
            if time.monotonic() < self._failed.get(name, 0.0):
                continue
            try:
                if not self._fetch(name):
                    return
            except Exception as error:  # fsspec packages have exceptions of their own
                self._failed[name] = time.monotonic() + PATIENCE
                _report(error)


def _report(error: Exception) -> None:
    if threading.main_thread().is_alive():  # else the interpreter ends, and connections are closed on purpose
        log.warning("not fetched ahead: %s", error)


_all: weakref.WeakSet[AheadThread] = weakref.WeakSet()


def _begin_all() -> None:
    """In a forked child the thread is not there, and its lock may never be given back."""
    for one in list(_all):
        one.begin()


def _wish_nothing() -> None:
    """No fetch starts while the interpreter ends; one that is under way ends with it and leaves nothing whole."""
    for one in list(_all):
        one.wish(())


os.register_at_fork(after_in_child=_begin_all)
atexit.register(_wish_nothing)
