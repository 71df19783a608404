"""What takes long is said, so that nobody waits in front of a silent terminal, and what a wait was for."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

_PATIENCE = 1.0  # seconds


class Told:
    """A context, entered whenever one thing is done: once it has taken a second in all, a line on standard error says
    so, where that is a terminal. It may be entered within itself and by several threads.

    what: the line, without the program's name. seconds: what it has taken so far, that which has ended.
    """

    def __init__(self, what: str) -> None:
        self.what, self.said = what, False
        self._lock = threading.Lock()
        self._inside, self._since, self.seconds = 0, 0.0, 0.0
        self._counts = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._since = time.monotonic()
            if not self.said:
                self._timer = threading.Timer(max(_PATIENCE - self.seconds, 0.0), self._say)
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
            if self._inside:
                return
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._counts:
                self.seconds += time.monotonic() - self._since
            self._counts = False

    def _say(self) -> None:
        with self._lock:
            if self.said or not self._inside:
                return
            self.said = True
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(f"mambaseq: {self.what}", file=sys.stderr)  # bars move out of its way


_compiling: list[Told] = []


def told_of_kernels(device: str) -> Told:
    """To be entered while kernels for a kind of device are compiled. Made once for each."""
    told = Told(f"kernels for the {device} are compiled; the next run takes them from disk")
    _compiling.append(told)
    return told


class Phases:
    """What a wait is made of: seconds of things that follow each other.

    since: when it began, of `time.perf_counter`; now if left out.
    seconds: of each thing that has ended, in their order.
    """

    def __init__(self, since: float | None = None) -> None:
        self.since = self._last = time.perf_counter() if since is None else since
        self.seconds: dict[str, float] = {}
        self._compiled = sum(told.seconds for told in _compiling)

    def end(self, name: str) -> None:
        """What came since the last end, or the beginning, was this."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def compiling(self) -> float:
        """Seconds in which kernels were compiled meanwhile, by several threads at once counted once."""
        return sum(told.seconds for told in _compiling) - self._compiled

    def plain(self) -> dict[str, float]:
        """Seconds as they are stored: of all, of each thing, and of kernels, which are part of those."""
        rounded = {name: round(spent, 3) for name, spent in self.seconds.items()}
        return {"all": round(self._last - self.since, 3), **rounded, "compiling kernels": round(self.compiling, 3)}

    def told(self) -> str:
        """Seconds for people: "9.8 s: imports 5.4, data 1.2, step 3.2 (of all, compiling kernels 2.1)"."""
        parts = [f"{name} {spent:.1f}" for name, spent in self.seconds.items() if spent >= 0.05]
        of = f" (of all, compiling kernels {self.compiling:.1f})" if self.compiling >= 0.05 else ""
        return f"{self._last - self.since:.1f} s: {', '.join(parts)}{of}"


def process_began() -> float:
    """When this process began, of `time.perf_counter`; now in one that has long been doing other things, for it has
    PyTorch, or where the system does not tell."""
    now = time.perf_counter()
    if "torch" in sys.modules or not hasattr(time, "CLOCK_BOOTTIME"):
        return now
    try:
        told = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
        ticks = int(told.rpartition(")")[2].split()[19])  # since the machine's boot, see proc(5)
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return now - age if 0 <= age < 3600 else now  # some containers have a clock of their own
