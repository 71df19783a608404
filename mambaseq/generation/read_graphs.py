"""Parts of prompts read by CUDA graphs: launching the kernels of a short part takes longer than running them."""

from __future__ import annotations

import collections
import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mambaseq.generation.decoder import can_capture, can_replay, tensors_of
from mambaseq.mixers.base import State
from mambaseq.models import SequenceModel
from mambaseq.models.modules import modules_of
from mambaseq.ops.gpu import capture

_MOST = 4  # graphs of a model: the latest used
_SEEN = 64  # shapes that are remembered
_PLAIN, _WATCHED, _NEVER = range(3)  # how a shape has been read last

# what a graph depends on besides values: shapes, and whether there is a state and a condition
Key = tuple[Any, ...]


@dataclasses.dataclass
class _Graph:
    """What it reads from and writes to, in memory of its own. weights: whose memory it reads besides."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    condition: Tensor | None
    state: list[Any] | None
    made: list[Any]
    told: Tensor
    weights: list[StorageWeakRef]

    def __post_init__(self) -> None:
        self._addresses = [one.cdata for one in self.weights]

    def is_safe(self) -> bool:
        """Whether all memory that it reads is still there; what the model is by now is another question."""
        # `StorageWeakRef.expired` of each takes seven times as long
        return not any(map(torch.UntypedStorage._expired, self._addresses))


@dataclasses.dataclass
class _Known:
    """What is known of a model. places: where its weights are."""

    places: tuple[int, ...]
    seen: collections.OrderedDict[Key, int] = dataclasses.field(default_factory=collections.OrderedDict)
    graphs: collections.OrderedDict[Key, _Graph] = dataclasses.field(default_factory=collections.OrderedDict)
    pool: Any = None


_known: weakref.WeakKeyDictionary[SequenceModel, _Known] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def plainly(
    model: SequenceModel, ids: Tensor, condition: Tensor | None, state: list[Any] | None
) -> tuple[list[Any], Tensor]:
    """The state after a part `(batch, length)` or `(batch, length, codes)`, and what is hidden behind its last
    position, `(batch, 1, d_model)`."""
    hidden, new = model.backbone(model.encoder(ids, condition), state=state, return_state=True)
    return new, hidden[:, -1:]


def read(
    model: SequenceModel, ids: Tensor, condition: Tensor | None, state: list[Any] | None
) -> tuple[list[Any], Tensor] | None:
    """The state after a part, and what the head tells of its last position `(batch, ...)`, both new; None if the part
    is to be read without a graph.

    A shape's first part is, its second is watched for waits, its third captured, and those after it replayed. The
    weights may change in place in between. Whether the model is still the one that was captured is looked at while
    the GPU is at work already.
    """
    key: Key = (tuple(ids.shape), None if condition is None else tuple(condition.shape), state is None)
    given = [] if state is None else state
    with _lock:
        known = _known.get(model)
        graph = None if known is None else known.graphs.get(key)
        begun: tuple[list[Any], Tensor] | None = None
        known_kinds = all(isinstance(layer, State) for layer in given)
        if graph is not None and known_kinds and not model.training and can_replay(ids) and graph.is_safe():
            begun = _replayed(graph, ids, condition, state)
        modules = modules_of(model)
        places = _places(modules)
        if known is not None and begun is not None:
            if known.places == places and can_capture(model, given, ids, modules):
                known.graphs.move_to_end(key)
                return begun
            torch.cuda.synchronize(ids.device)  # before the graph goes
            known = None  # only this part is read in vain
        if known is None or known.places != places:
            known = _known[model] = _Known(places)
        last = known.seen.get(key)
        if last == _NEVER:
            return None
        if last is None:
            known.seen[key] = _PLAIN
            if len(known.seen) > _SEEN:
                known.seen.popitem(last=False)
            return None
        if model.training or not can_capture(model, given, ids, modules):
            return None
        if last == _PLAIN:
            with torch.cuda.device(ids.device), capture.capturing:
                told, waits = capture.warm_up(
                    lambda: _told(model, ids, condition, state), torch.cuda.Stream(ids.device)
                )
                for tensor in (*tensors_of(told[0]), told[1]):
                    tensor.record_stream(torch.cuda.current_stream())
            known.seen[key] = _NEVER if waits else _WATCHED
            return told
        graph = _captured(model, known, modules, ids, condition, state)
        if graph is None:
            known.seen[key] = _NEVER
            return None
        known.graphs[key] = graph
        if len(known.graphs) > _MOST:
            known.graphs.popitem(last=False)
        return _replayed(graph, ids, condition, state)


def _places(modules: Sequence[nn.Module]) -> tuple[int, ...]:
    held = (parameter for module in modules for parameter in module._parameters.values())
    return tuple(parameter.data_ptr() for parameter in held if parameter is not None)


def _told(
    model: SequenceModel, ids: Tensor, condition: Tensor | None, state: list[Any] | None
) -> tuple[list[Any], Tensor]:
    new, last = plainly(model, ids, condition, state)
    return new, model.told(last)[:, -1]


def _captured(
    model: SequenceModel,
    known: _Known,
    modules: Sequence[nn.Module],
    ids: Tensor,
    condition: Tensor | None,
    state: list[Any] | None,
) -> _Graph | None:
    """None if it cannot be. The graphs of a model share their memory: results are copied before another one runs."""
    ids, condition = ids.clone(), None if condition is None else condition.clone()
    state = None if state is None else [layer.clone() for layer in state]
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(ids.device), capture.capturing:
            if known.pool is None:
                known.pool = torch.cuda.graph_pool_handle()
            made, told = capture.capture(graph, lambda: _told(model, ids, condition, state), pool=known.pool)
    except RuntimeError:  # no memory, or what cannot be captured
        return None
    held = [tensor for m in modules for tensor in (*m._parameters.values(), *m._buffers.values()) if tensor is not None]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in held}
    return _Graph(graph, ids, condition, state, made, told, [StorageWeakRef(one) for one in storages.values()])


def _replayed(
    graph: _Graph, ids: Tensor, condition: Tensor | None, state: list[Any] | None
) -> tuple[list[Any], Tensor]:
    graph.ids.copy_(ids)
    if graph.condition is not None and condition is not None:
        graph.condition.copy_(condition)
    if graph.state is not None and state is not None:
        torch._foreach_copy_(tensors_of(graph.state), tensors_of(state))
    graph.graph.replay()
    made = [layer.map(torch.empty_like) for layer in graph.made]
    if into := tensors_of(made):
        torch._foreach_copy_(into, tensors_of(graph.made))  # by a few kernels, where clones would take one each
    return made, graph.told.clone()
