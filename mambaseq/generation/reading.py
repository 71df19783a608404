"""Prompts are read: the state after each, whatever their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambaseq.backbones.unet import UNet
from mambaseq.errors import ConfigError
from mambaseq.generation import read_graphs
from mambaseq.generation.prompts import Prompts
from mambaseq.mixers.base import State
from mambaseq.mixers.growing import GrowingState
from mambaseq.models import SequenceModel
from mambaseq.ops import sequences

# Tokens of prompts that are read at once, all sequences together: of one prompt at most, if it is long.
_PREFILL = 8192


@torch.no_grad()
def prefill(
    model: SequenceModel,
    prompts: Prompts,
    condition: Tensor | None,
    state: list[Any] | None = None,
    *,
    cuda_graph: bool = True,
) -> tuple[list[Any], Tensor]:
    """The state after the prompts, and what the head tells of their last position only (see `Head.told`), since all of
    a long prompt's would not fit. They are read in parts and the state passed on, so memory does not grow with them.
    Prompts of several lengths are packed, so that nothing is padded.

    condition: `(batch,)` int64, or `(batch, conditions)` rows (see `Batch`). state: what was read before, of prompts of
        one length; it stays as it is. cuda_graph: on a CUDA device, parts of a shape that came before are replayed from
        a CUDA graph (see `generation/read_graphs.py`).

    Raises ConfigError for an empty prompt, and for prompts of several lengths that go on from a state.
    """
    if not len(prompts) or not min(prompts.lengths):
        raise ConfigError("Generation needs a prompt of at least one token for each sequence.")
    if len(set(prompts.lengths)) == 1:
        return _in_parts(model, prompts, condition, state, cuda_graph)
    if state is not None:
        raise ConfigError("Prompts that go on from a state must have one length.")
    states, told, order = [], [], []
    for pack in _packs(prompts.lengths):
        some, under = prompts.only(pack), None if condition is None else condition[pack]
        read = _in_parts if len(set(some.lengths)) == 1 else _packed
        found, logits = read(model, some, under)
        states.append(found)
        told.append(logits)
        order += pack
    back = torch.tensor(order).argsort().to(prompts.device)
    return [layer.select(back) for layer in joined(states)], torch.cat(told)[back]


def best_even(model: SequenceModel) -> bool:
    """Whether prompts of one length are continued faster together than those of several: where windows are, a step
    computes only what is due."""
    return isinstance(model.backbone, UNet)


def _packs(lengths: Sequence[int]) -> list[list[int]]:
    """Prompts, by number, that are read together: the shortest first, long ones alone."""
    found: list[list[int]] = []
    taken = _PREFILL
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        taken += lengths[number]
        if taken > _PREFILL:
            found.append([])
            taken = lengths[number]
        found[-1].append(number)
    return found


def _in_parts(
    model: SequenceModel,
    prompts: Prompts,
    condition: Tensor | None,
    state: list[Any] | None = None,
    cuda_graph: bool = True,
) -> tuple[list[Any], Tensor]:
    """Prompts of one length. Parts depend on it alone, not on how many prompts there are, so that none depends on its
    neighbours: long ones are read alone, short ones some at a time."""
    length, several = prompts.lengths[0], len(prompts)
    part = min(length, _PREFILL)
    at_once = _PREFILL // part
    if several <= at_once:
        for start in range(0, length, part):
            ids = prompts.read(start, start + part)
            by_graph = read_graphs.read(model, ids, condition, state) if cuda_graph and ids.is_cuda else None
            state, last = read_graphs.plainly(model, ids, condition, state) if by_graph is None else by_graph
        assert state is not None
        return _contiguous(state), last if by_graph is not None else model.told(last)[:, -1]
    states, told = [], []
    for first in range(0, several, at_once):
        some = list(range(first, min(first + at_once, several)))
        under = None if condition is None else condition[some]
        rows = torch.tensor(some, device=prompts.device)
        begun = None if state is None else [layer.select(rows) for layer in state]
        found, logits = _in_parts(model, prompts.only(some), under, begun, cuda_graph)
        states.append(found)
        told.append(logits)
    return joined(states), torch.cat(told)


def _packed(model: SequenceModel, prompts: Prompts, condition: Tensor | None) -> tuple[list[Any], Tensor]:
    """Prompts of several lengths, in one row."""
    row = torch.cat([prompts.only([number]).read(0, length)[0] for number, length in enumerate(prompts.lengths)])
    ends = torch.tensor([0, *prompts.lengths]).cumsum(0).to(row.device)
    bounds = ends.to(torch.int32)
    with sequences.shared_tables():  # which each layer would make anew
        x = model.encoder(row[None], condition, bounds)
        hidden, state = model.backbone(x, cu_seqlens=bounds, return_state=True)
    return _contiguous(state), model.told(hidden[0, ends[1:] - 1][:, None])[:, -1]


def _contiguous(state: list[Any]) -> list[Any]:
    return [layer.map(Tensor.contiguous) if isinstance(layer, State) else layer for layer in state]


def joined(states: Sequence[list[Any]]) -> list[Any]:
    """States of several batches, a list of layers each, as those of one. They stay as they are."""
    return [_joined(layers) for layers in zip(*states, strict=True)]


def _joined(layers: Sequence[Any]) -> Any:
    first = layers[0]
    if len(layers) == 1:
        return first
    if isinstance(first, GrowingState):
        layers = [layer.map(Tensor.clone) for layer in layers]
        first = layers[0]
        room = max(layer.capacity for layer in layers)
        for layer in layers:
            layer.reserve_(room)
        first.longest = max(layer.longest for layer in layers)
    names = list(first.tensors())
    tensors = {name: torch.cat([getattr(layer, name) for layer in layers]) for name in names}
    whole = first.map(lambda tensor: tensor)
    for name, tensor in tensors.items():
        setattr(whole, name, tensor)
    return whole
