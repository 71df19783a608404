"""Imports that take seconds, made quicker."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected(for_good: bool = False) -> Iterator[None]:
    """Python's garbage collector stands still meanwhile. PyTorch and Lightning make a million objects that stay, and it
    would look through them again and again: a sixth of the time until the first step of a training.

    for_good: if PyTorch is imported meanwhile, the collector leaves all that is there at the end alone from then on.
    Only for a process that is ours.
    """
    was_on, had_torch = gc.isenabled(), "torch" in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if for_good and not had_torch and "torch" in sys.modules:
            gc.freeze()
        if was_on:
            gc.enable()
