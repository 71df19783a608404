"""Time and memory of a call, and handling of calls that fail."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# calls in a row, as in training; longer calls are timed singly
CALLS = 5
SHORT_MS = 5.0
# work before anything is timed: the clocks of an idle GPU must rise first
WARM_UP_S = 0.05
# spinning of a GPU, cycles a second: not below what its clock can reach, or the queue would run dry
CYCLES = 2e9
LONGEST_HOLD_S = 0.02


class Timing(NamedTuple):
    """Median milliseconds of a call, and of the host's part in it."""

    ms: float
    host_ms: float


def measure(
    function: Callable[[], Any],
    device: torch.device,
    repeats: int,
    *,
    budget_s: float = 0.6,
    warm_up_s: float | None = WARM_UP_S,
    hold: bool = False,
) -> Timing:
    """Time a function by CUDA events, on a CPU by the clock: the median of at most `repeats` samples.

    A GPU must be the current one (see `on`).

    Args:
        budget_s: samples stop once they took this long together; one is always taken.
        warm_up_s: seconds of uncounted calls, after a first one that may compile. None for a long function that has
            been called already: no such calls.
        hold: keep the GPU busy while the host queues a sample's calls, so that only the GPU's work is timed. Without
            it, a call shorter than its launches takes as long as they do.
    """
    on_gpu = device.type == "cuda"

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    def once() -> tuple[float, float]:
        start = time.perf_counter()
        function()
        asked = time.perf_counter() - start
        synchronize()
        return time.perf_counter() - start, asked

    last, host = math.inf, 0.0
    if warm_up_s is not None:
        last, host = once()
        began = time.perf_counter()
        while time.perf_counter() - began < warm_up_s:
            last, host = once()
    synchronize()
    calls = CALLS if on_gpu and last * 1e3 < SHORT_MS else 1
    samples: list[float] = []
    hosts: list[float] = []
    spent = 0.0
    while len(samples) < max(repeats, 1) and (not samples or spent < budget_s):
        start = time.perf_counter()
        if on_gpu:
            if hold:
                torch.cuda._sleep(int(min(1.5 * host * calls, LONGEST_HOLD_S) * CYCLES))
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        asked = time.perf_counter()
        for _ in range(calls):
            function()
        hosts.append((time.perf_counter() - asked) / calls)
        if on_gpu:
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / calls)
        else:
            samples.append(hosts[-1] * 1e3)
        spent += time.perf_counter() - start
    return Timing(statistics.median(samples), statistics.median(hosts) * 1e3)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one, since events and waiting streams belong to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that a call allocates beyond what was allocated before; None if it is not counted."""
    if device.type != "cuda":
        function()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# status, note, result
Attempt = tuple[str, str, Any]


def attempt(function: Callable[[], Any]) -> Attempt:
    """Run it: `(status, note, result)` with status "ok", "oom" or "failed" and the reason, and memory given back."""
    status, note, result = "ok", "", None
    try:
        result = function()
    except torch.OutOfMemoryError:
        status, note = "oom", "out of memory"
    except Exception as error:  # a failing peer must not end the other rows
        first = (str(error).strip().splitlines() or [""])[0]
        status, note = "failed", f"{type(error).__name__}: {first}"
        if "ALLOC_FAILED" in first:  # of cuBLAS and cuFFT
            status, note = "oom", "out of memory"
    if status != "ok":
        release()
    return status, note, result


def release() -> None:
    """Return a GPU's freed memory, so that every contender starts alike.

    Without a GPU memory is not counted, and Python's own collections are enough: a full one takes half a second.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
