"""What takes long is said, so that nobody waits in front of a silent terminal."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

_PATIENCE = 1.0  # seconds


class Told:
    """A context, entered whenever one thing is done: once it has taken a second in all, a line on standard error says
    so, where that is a terminal. It may be entered within itself and by several threads.

    what: the line, without the program's name.
    """

    def __init__(self, what: str) -> None:
        self.what, self.said = what, False
        self._lock = threading.Lock()
        self._inside, self._since, self._before = 0, 0.0, 0.0
        self._counts = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1 or self.said:
                return
            self._since = time.monotonic()
            self._timer = threading.Timer(max(_PATIENCE - self._before, 0.0), self._say)
            self._timer.daemon = True
            self._timer.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self, *, counts: bool = True) -> None:
        """End what was entered. counts: whether it was the thing after all, whose time adds up with others'."""
        with self._lock:
            self._inside -= 1
            self._counts |= counts
            if self._inside == 0 and self._timer is not None:
                self._timer.cancel()
                self._timer = None
                if self._counts:
                    self._before += time.monotonic() - self._since
                self._counts = False

    def _say(self) -> None:
        with self._lock:
            if self.said or not self._inside:
                return
            self.said = True
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(f"mambaseq: {self.what}", file=sys.stderr)  # bars move out of its way
