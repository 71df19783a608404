"""SIGTERM while a run has no step to finish: the process ends at once, as by default, but says how the run goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class _Ends:
    """A handler that says something, and leaves the signal to what it does by default."""

    def __init__(self, told: Callable[[], str]) -> None:
        self._told, self._process = told, os.getpid()

    def say(self) -> None:
        if os.getpid() == self._process and (told := self._told()):  # not what it has forked
            with contextlib.suppress(OSError):  # print is not safe here: the signal may have interrupted one
                os.write(2, f"\n{told}\n".encode())

    def is_set(self) -> bool:
        return signal.getsignal(signal.SIGTERM) is self

    def __call__(self, number: int, frame: Any) -> None:
        self.say()
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


@contextlib.contextmanager
def lent_to_lightning(trainer: Any) -> Iterator[None]:
    """Around a trainer's fit, within `told_of_sigterm`. Lightning sets a handler once processes have met, which only
    takes note of SIGTERM, and asks the other processes, who do not listen before the first step: it sets that one
    instead. While several meet they wait within calls that no handler interrupts, so a thread does what it would."""
    ends = signal.getsignal(signal.SIGTERM)
    if not isinstance(ends, _Ends) or threading.current_thread() is not threading.main_thread():
        yield
        return
    trainer._signal_connector._sigterm_notifier_fn = ends
    if trainer.world_size == 1:
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    threading.Thread(target=_listen, args=(reads, ends), daemon=True, name="sigterm").start()
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writes)  # by which the thread ends


def _listen(reads: int, ends: _Ends) -> None:
    """End the process after SIGTERM, unless there is another handler, or this one does within a second."""
    while numbers := os.read(reads, 64):
        if signal.SIGTERM not in numbers or not ends.is_set():
            continue
        time.sleep(1.0)
        if ends.is_set():
            ends.say()
            os._exit(128 + signal.SIGTERM)
    os.close(reads)
