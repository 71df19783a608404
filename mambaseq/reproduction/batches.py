"""Batches of training steps on the device: newly drawn, from arrays of examples, or from one long text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.data.drawing import below, words
from mambaseq.errors import DataError
from mambaseq.reproduction.training import BatchOf


def numbers(step: Tensor, batch_size: int) -> Tensor:
    """Numbers of the items of a step, `(batch_size,)` int64, which follow those of the step before."""
    return step * batch_size + torch.arange(batch_size, device=step.device)


def drawn(draw: Callable[[int, Tensor], tuple[Tensor, Tensor]], batch_size: int, seed: int) -> BatchOf:
    """Batches from a function of the seed and item numbers `(batch_size,)` int64 to inputs and targets, whose first
    dimension is the item; no item comes twice."""

    def batch_of(step: Tensor) -> Batch:
        inputs, targets = draw(seed, numbers(step, batch_size))
        return Batch(inputs=inputs, targets=targets)

    return batch_of


def of_arrays(inputs: Tensor, targets: Tensor, mask: Tensor | None, batch_size: int, seed: int) -> BatchOf:
    """Random batches from arrays of examples, whose first dimension is the example."""

    def batch_of(step: Tensor) -> Batch:
        chosen = below(words(seed, numbers(step, batch_size), 1)[:, 0], len(inputs))
        return Batch(inputs=inputs[chosen], targets=targets[chosen], mask=None if mask is None else mask[chosen])

    return batch_of


def of_text(tokens: Tensor, length: int, batch_size: int, seed: int) -> BatchOf:
    """Windows of `length` tokens and the token after each, at random places of `(tokens,)` with any integer dtype.

    Raises DataError for a text that has no such window.
    """
    if len(tokens) <= length:
        raise DataError(f"A text of {len(tokens)} tokens has no window of {length} and the token after it.")
    within = torch.arange(length + 1, device=tokens.device)

    def batch_of(step: Tensor) -> Batch:
        first = below(words(seed, numbers(step, batch_size), 1), len(tokens) - length)
        window = tokens[first + within].long()
        return Batch(inputs=window[:, :-1], targets=window[:, 1:])

    return batch_of
