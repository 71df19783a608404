"""Capturing CUDA graphs: one at a time, and cleaned up if it fails."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

_SYNCHRONIZING = "called a synchronizing CUDA operation"
# what PyTorch warns of because of how `warm_up` runs something
_OWN = (_SYNCHRONIZING, "Synchronization debug mode is a prototype", "AccumulateGrad node's stream does not match")
# held around warm_up and capture: PyTorch captures one graph at a time, and its watch for synchronisation is global
capturing = threading.Lock()
_failed: list[torch.cuda.CUDAGraph] = []


def warm_up(run: Callable[[], _T], stream: torch.cuda.Stream) -> tuple[_T, bool]:
    """What `run` returns, run on a side stream as PyTorch asks for before a capture, and whether it waits for the GPU:
    a capture would fail then, and PyTorch does not clean up after those."""
    current = torch.cuda.current_stream()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        stream.wait_stream(current)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with torch.cuda.stream(stream):
                result = run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(stream)
    pass_on(seen)
    return result, any(_SYNCHRONIZING in str(warning.message) for warning in seen)


def pass_on(seen: Iterable[warnings.WarningMessage]) -> None:
    """Warn of what `run` warned of while it was watched, each once: the warnings that the watch brings left out."""
    others = {
        (str(warning.message), warning.category, warning.filename, warning.lineno): warning
        for warning in seen
        if not any(own in str(warning.message) for own in _OWN)
    }
    for warning in others.values():
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def capture(
    graph: torch.cuda.CUDAGraph, run: Callable[[], _T], stream: torch.cuda.Stream | None = None, pool: Any = None
) -> _T:
    """What `run` returns, whose work on the GPU goes into the graph; tensors of its own are then the graph's memory.

    Raises what `run` or the end of the capture does (RuntimeError for what cannot be captured), cleaned up after.
    """
    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # a failed capture does not restore it
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            return run()
    except BaseException:
        _clean_up(graph)
        raise


class Recorder:
    """Captures graphs one after the other, on one stream, into one memory. Each may use what is free when it is
    captured, so they are to be replayed in the order of their captures, where one reads what another has left."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool: Any = None

    def warm_up(self, run: Callable[[], _T]) -> tuple[_T, bool]:
        """See `warm_up`."""
        return warm_up(run, self._stream)

    def __call__(self, run: Callable[[], _T]) -> tuple[torch.cuda.CUDAGraph, _T]:
        """The graph of `run`, and what that gave; see `capture`."""
        if self._pool is None:
            torch.cuda.empty_cache()  # what a warm-up took: a capture takes its own memory, and cannot free other
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        return graph, capture(graph, run, self._stream, self._pool)


class Replay:
    """Work on a GPU that reads tensors where they are each time: the first call runs it, watched for waits, the second
    captures it in a CUDA graph, which it and later ones replay. Where that cannot be, all calls run it.

    run: gives tensors; those of a graph are the same at each call, and overwritten by the next. device: of the work;
    on others than GPUs it is always run. pool: of `torch.cuda.graph_pool_handle`, for graphs that may use the same
    memory: what one gives is then overwritten by the next call of any.
    why_not: the reason why it cannot be captured, None where it can.
    """

    def __init__(self, run: Callable[[], tuple[Tensor, ...]], device: torch.device, pool: Any = None) -> None:
        self._run, self._device, self._pool = run, device, pool
        self.why_not = None if device.type == "cuda" else f"there are no graphs on {device.type}"
        self._watched = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._made: tuple[Tensor, ...] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        if self._graph is None and self.why_not is None:
            with torch.cuda.device(self._device), capturing:
                if not self._watched:
                    return self._watch()
                self._capture()
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._made

    def _watch(self) -> tuple[Tensor, ...]:
        self._watched = True
        made, waits = warm_up(self._run, torch.cuda.Stream(self._device))
        for tensor in made:
            tensor.record_stream(torch.cuda.current_stream())
        if waits:
            self.why_not = "it waits for the GPU"
        return made

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            self._made = capture(graph, self._run, pool=self._pool)
        except RuntimeError as error:  # no memory, or what cannot be captured
            self.why_not = str(error).partition("\n")[0]
        else:
            self._graph = graph


def _clean_up(graph: torch.cuda.CUDAGraph) -> None:
    """After a failed capture the allocator keeps a reference to its graph, and the random generator believes that it is
    being captured until a capture succeeds."""
    _failed.append(graph)
    with (
        contextlib.suppress(RuntimeError),
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"),
    ):
        torch.zeros(1, device="cuda")
