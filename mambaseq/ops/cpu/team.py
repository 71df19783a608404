# mypy: allow-untyped-defs
"""Helper threads for many short parallel kernels in a row, as in decoding. Waking a sleeping thread takes too long
there (a tenth of a millisecond on a virtual machine).

A kernel hands out its work by counters in memory and waits until all of it is done, so its result is right with any
number of helpers: none, or some that come late. After a kernel, helpers watch for the next one for a moment before they
go to sleep.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np
import torch

from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.ops.cpu.intrinsics import load, yield_core

# Between the counters of a kernel, so that no two share a cache line.
STRIDE = 16
# How often a helper looks before it sleeps; about half a millisecond.
_LOOKS = 1_000_000


# Looks between which a thread lets others have its core: what it waits for may be done by one that has none.
_PATIENCE = 4096
_YIELDS = yield_core is not None


@kept_njit(nogil=True)
def _look(posted, seen, looks):
    for number in range(looks):
        if load(posted, 0) != seen:
            return True
        if _YIELDS and number % _PATIENCE == _PATIENCE - 1:
            yield_core()
    return False


@inner_njit(nogil=True)
def wait(counters, at, n):
    """Return when the counter is at least n."""
    looks = 0
    while load(counters, at) < n:
        looks += 1
        if _YIELDS and looks >= _PATIENCE:
            yield_core()


class _Helper(threading.Thread):
    """Runs the latest posted job; skips one that the next has overtaken."""

    def __init__(self) -> None:
        super().__init__(name="mambaseq-helper", daemon=True)
        self._posted = np.zeros(1, dtype=np.int64)
        self._job: Callable[[], None] | None = None
        self._asleep = False
        self._wake = threading.Event()
        self.start()

    def post(self, job: Callable[[], None]) -> None:
        self._job = job
        self._posted[0] += 1
        if self._asleep:
            self._wake.set()

    def run(self) -> None:
        seen = 0
        while True:
            if not _look(self._posted, seen, _LOOKS):
                self._asleep = True
                # What is posted from here on sets the event; what was posted before is seen here.
                if self._posted[0] == seen:
                    self._wake.wait()
                self._asleep = False
                self._wake.clear()
            seen, job = int(self._posted[0]), self._job
            self._job = None
            if job is not None:
                job()
                del job


_helpers: list[_Helper] = []


def _forget_helpers() -> None:
    """Threads do not survive a fork."""
    _helpers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def run(kernel: Callable[[], None], portions: int) -> None:
    """Run a kernel on this thread and on helpers, at most `torch.get_num_threads()` in all.

    Args:
        kernel: hands out its work by counters, returns when all of it is done, and raises nothing.
        portions: how many pieces of work it hands out, which is how many threads can be of use; 1 for little work.
    """
    n_helpers = min(torch.get_num_threads(), portions) - 1
    while len(_helpers) < n_helpers:
        _helpers.append(_Helper())
    for helper in _helpers[: max(0, n_helpers)]:
        helper.post(kernel)
    kernel()
