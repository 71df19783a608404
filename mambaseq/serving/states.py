"""States of sequences in a few tensors: with one for each layer, moving a sequence takes an operator a layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from mambaseq.mixers.base import State

Groups = list[Tensor]
"""States of n sequences: for each shape and dtype that a model's layers have `(members, n, ...)`."""

_ALIGNED = 256  # bytes at whose multiples members begin, as those of tensors of their own do


class Layout:
    """Where the layers' tensors are among the groups.

    like: states of the empty history of one sequence, as the model makes them; what in them is no tensor is the same
    for all sequences.
    """

    def __init__(self, like: list[State]) -> None:
        self._like = like
        self._places: list[dict[str, tuple[int, int]]] = []
        keys: dict[tuple[torch.dtype, tuple[int, ...]], int] = {}
        self._counts: list[int] = []  # members of each group
        for layer in like:
            places = {}
            for name, tensor in layer.tensors().items():
                key = tensor.dtype, tuple(tensor.shape[1:])
                if key not in keys:
                    keys[key] = len(keys)
                    self._counts.append(0)
                places[name] = keys[key], self._counts[keys[key]]
                self._counts[keys[key]] += 1
            self._places.append(places)
        self.empty = self.grouped(like)

    def room(self, count: int) -> Groups:
        """For so many sequences, each with an empty history. Members begin where tensors of their own would."""
        made = []
        for one in self.empty:
            size = count * one[0].numel()
            multiple = max(_ALIGNED // one.element_size(), 1)
            flat = one.new_zeros(len(one), -(-size // multiple) * multiple)
            made.append(
                flat[:, :size].view(len(one), count, *one.shape[2:]).copy_(one.expand(-1, count, *one.shape[2:]))
            )
        return made

    def grouped(self, states: Sequence[State], into: Groups | None = None) -> Groups:
        """The layers' states of some sequences, as a copy; `into` groups for as many."""
        tensors: list[list[Tensor]] = [[] for _ in self._counts]
        for layer, places in zip(states, self._places, strict=True):
            found = layer.tensors()
            for name, (group, _) in places.items():
                tensors[group].append(found[name])
        if into is None:
            return [torch.stack(members) for members in tensors]
        for members, out in zip(tensors, into, strict=True):
            torch.stack(members, out=out)
        return into

    def layers(self, groups: Groups, count: int | None = None) -> list[State]:
        """The states of the first `count` sequences as the model takes them; views of the groups."""
        found = []
        for like, places in zip(self._like, self._places, strict=True):
            layer = copy.copy(like)
            for name, (group, member) in places.items():
                setattr(layer, name, groups[group][member, :count])
            found.append(layer)
        return found


def row_of(groups: Groups, row: int) -> Groups:
    """The state of one sequence; a view."""
    return [group[:, row : row + 1] for group in groups]


def copy_rows_(groups: Groups, first: int, states: Sequence[Groups]) -> None:
    """Copy states of one sequence each over those of the sequences from `first` on."""
    mine = [group[:, first + number] for number in range(len(states)) for group in groups]
    if mine:  # models that remember nothing have no tensors
        torch._foreach_copy_(mine, [tensor[:, 0] for state in states for tensor in state])


def joined(states: Sequence[Groups]) -> Groups:
    """States of several sequences as those of a batch."""
    return [torch.cat(tensors, dim=1) for tensors in zip(*states, strict=True)]
