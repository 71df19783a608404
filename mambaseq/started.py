"""Processes of a run that Lightning has started: they end with the first process, also before they have met it."""

from __future__ import annotations

import os
import sys
import threading
import time

# in the environment of what a first process starts while it trains: its number
STARTED_BY = "MAMBASEQ_FIRST_PROCESS"


def watch_from_the_start() -> None:
    """To be called as early as a process can, before anything slow is imported. One that Lightning has started ends
    with the first process from now on; otherwise it would wait half an hour for the address of one that is dead."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return
    first = os.environ.pop(STARTED_BY, "")  # for this process, none of those that it starts
    if first.isdecimal():
        threading.Thread(target=end_with, args=(int(first),), daemon=True, name="parent-observer").start()


def end_with(parent: int, every: float = 1.0, grace: float = 3.0) -> None:
    """Wait until this process's parent is another one than the process of this number, and end it."""
    while os.getppid() == parent:
        time.sleep(every)
    time.sleep(grace)  # most processes notice it by a message that fails, and end in order
    print("mambaseq: the first process of this run has ended, so this one ends.", file=sys.stderr, flush=True)
    os._exit(1)
