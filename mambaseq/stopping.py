"""SIGTERM while a run has no step to finish: the process ends at once, as by default, but says how the run goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class _Ends:
    """A handler that says something, and leaves the signal to what it does by default."""

    def __init__(self, told: Callable[[], str]) -> None:
        self._told, self._process = told, os.getpid()

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() == self._process and (told := self._told()):  # not what it has forked
            with contextlib.suppress(OSError):  # print is not safe here: the signal may have interrupted one
                os.write(2, f"\n{told}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def told_of_sigterm(told: Callable[[], str]) -> Iterator[None]:
    """Within, SIGTERM writes a line to standard error before it ends the process. A handler that somebody has set is
    left as it is. told: the line, "" for none; called by the handler, so wherever the program is."""
    before = signal.getsignal(signal.SIGTERM)
    ours = before == signal.SIG_DFL or isinstance(before, _Ends)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _Ends(told))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def lend_to_lightning(trainer: Any) -> None:
    """To be called before a trainer fits. Lightning sets a handler once processes have met, which only takes note of
    SIGTERM, and asks the other processes, who do not listen before the first step: it sets this one instead. While
    several meet, they wait within calls that no handler interrupts, so until then they have none."""
    ends = signal.getsignal(signal.SIGTERM)
    if not isinstance(ends, _Ends) or threading.current_thread() is not threading.main_thread():
        return
    trainer._signal_connector._sigterm_notifier_fn = ends
    if trainer.world_size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
