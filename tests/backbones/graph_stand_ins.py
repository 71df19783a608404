"""In place of CUDA graphs, on CPUs: what was captured is run again, in the same memory. Tests of a file that imports
the fixture `stand_in_graphs` have them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mambaseq.backbones import graphed


class Graph:
    """Runs what was recorded again, and leaves what it gives where the first run has left it. What graphs recorded
    later gave is overwritten, as is memory that they may share; and so is what this one gives, while it is captured."""

    def __init__(self, run: Callable[[], Sequence[Tensor | None] | None], everyone: list[Graph]) -> None:
        self._run, self._everyone, self._number = run, everyone, len(everyone)
        known = {tensor.data_ptr() for other in everyone for tensor in other._own}
        self.made = run()
        self._own = [t for t in self.made or () if t is not None and t.data_ptr() not in known]
        everyone.append(self)
        self._spoil()

    def _spoil(self) -> None:
        for tensor in self._own:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.data.fill_(torch.nan)  # as a GPU does it: no version is counted

    def replay(self) -> None:
        Recorder.replayed.append(self._number)
        for other in self._everyone[self._number + 1 :]:
            other._spoil()
        for memory, tensor in zip(self.made or (), self._run() or (), strict=True):
            if memory is not None and tensor is not None:
                memory.data.copy_(tensor.detach())


class Recorder:
    """As `mambaseq.ops.gpu.capture.Recorder`."""

    replayed: ClassVar[list[int]] = []  # the numbers of graphs, of all recorders

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def warm_up(self, run: Callable[[], Any]) -> tuple[Any, bool]:
        return run(), False

    def __call__(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
        graph = Graph(run, self.graphs)
        return graph, graph.made


@pytest.fixture(autouse=True)
def stand_in_graphs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Modules on CPUs capture graphs as they do on a GPU. Tests that are marked `gpu` have the true ones."""
    Recorder.replayed.clear()

    @contextlib.contextmanager
    def recording(self: Any, device: torch.device) -> Iterator[Recorder]:
        yield Recorder()

    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(graphed, "on_gpu", lambda device: True)
        monkeypatch.setattr(graphed.Graphs, "_recording", recording)
