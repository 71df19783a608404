"""Ranks as threads of this process, each with a gloo group of its own: what processes say, without their start."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from mambaseq.parallel import Context

_CONTEXTS: dict[int, list[Context]] = {}


def contexts(size: int) -> list[Context]:
    """A context a rank, made once."""
    if size not in _CONTEXTS:
        store = dist.HashStore()
        _CONTEXTS[size] = on_ranks(
            size, lambda rank: Context(dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(seconds=10)))
        )
    return _CONTEXTS[size]


def on_ranks(size: int, function: Callable[[int], Any]) -> list[Any]:
    """function(rank) on each rank, side by side; its results in order. Raises what the first one that failed did."""
    found: list[Any] = [None] * size
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            found[rank] = function(rank)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        _CONTEXTS.clear()  # whose groups may be broken
        # one that lost its neighbour says less
        raise min(errors.items(), key=lambda item: ("Timed out" in str(item[1]) or "closed" in str(item[1]), item[0]))[
            1
        ]
    return found
