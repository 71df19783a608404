"""Run a kernel that releases the GIL on several threads.

Numba's own `parallel=True` is not safe here: two threads must not enter its default threading layer at once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    """Threads do not survive a fork."""
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < count:
        # A smaller pool that another thread still uses finishes its work and goes.
        _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="mambaseq"), count
    return _pool


def share(
    n_tasks: int,
    make_worker: Callable[[], Callable[[int, int], None]],
    *,
    serial: bool = False,
    portions: int = 8,
) -> None:
    """Do tasks `0 … n_tasks - 1`, by `torch.get_num_threads()` threads of which the caller is one.

    Args:
        make_worker: called once on each thread; gives a function of `(first, end)` that does these tasks,
            with scratch memory of its own. Which thread does a task must not change the result.
        portions: pieces of work per thread; several, so that others take over the share of a thread that is held up.
        serial: use the calling thread only, for little work.
    """
    n_threads = 1 if serial else min(torch.get_num_threads(), n_tasks)
    portion = n_tasks if n_threads <= 1 else max(1, -(-n_tasks // (portions * n_threads)))
    starts = itertools.count(0, portion)  # next() is atomic

    def work() -> None:
        worker: Callable[[int, int], None] | None = None
        while (first := next(starts)) < n_tasks:
            worker = worker or make_worker()
            worker(first, min(first + portion, n_tasks))

    futures: list[Future[None]] = []
    if n_threads > 1:
        pool = _workers(n_threads - 1)
        futures = [pool.submit(work) for _ in range(n_threads - 1)]
    try:
        work()
    finally:
        for future in futures:
            # One that has not begun finds nothing left to do.
            if not future.cancel():
                future.result()
