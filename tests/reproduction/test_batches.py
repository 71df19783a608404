"""Batches are functions of the step's number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambaseq.data.drawing import below, words
from mambaseq.errors import DataError
from mambaseq.reproduction.batches import drawn, of_arrays, of_text


def draw(seed: int, items: Tensor) -> tuple[Tensor, Tensor]:
    return below(words(seed, items, 6), 100), items


INPUTS, TARGETS = torch.arange(60).view(20, 3), torch.arange(20)
MAKERS: list[Callable[[int], Any]] = [
    lambda seed: drawn(draw, 4, seed),
    lambda seed: of_arrays(INPUTS, TARGETS, INPUTS % 3 < 2, 4, seed),
    lambda seed: of_text(torch.arange(1000), 10, 4, seed),
]


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_number_gives_the_same_batch(make: Callable[[int], Any]) -> None:
    batch_of, again = make(0), make(0)
    batches = [batch_of(torch.tensor(step)) for step in (5, 0, 10**9, 6)]
    for step, batch in zip((5, 0, 10**9, 6), batches, strict=True):
        same = again(torch.tensor(step))
        assert torch.equal(same.inputs, batch.inputs)
        assert torch.equal(same.targets, batch.targets)
    assert not any(torch.equal(a.inputs, b.inputs) for a, b in itertools.combinations(batches, 2))
    assert not torch.equal(make(1)(torch.tensor(5)).inputs, batches[0].inputs)


def test_no_item_is_drawn_twice() -> None:
    batch_of = drawn(draw, 4, 0)
    items = torch.cat([batch_of(torch.tensor(step)).targets for step in range(5)])
    assert items.tolist() == list(range(20))


def test_arrays_stay_together_and_all_of_them_come() -> None:
    mask = INPUTS % 3 < 2
    batch_of = of_arrays(INPUTS, TARGETS, mask, 4, 0)
    batches = [batch_of(torch.tensor(step)) for step in range(100)]
    for batch in batches:
        assert batch.inputs.shape == (4, 3)
        assert torch.equal(batch.inputs, INPUTS[batch.targets])
        assert torch.equal(batch.mask, mask[batch.targets])
    counts = torch.bincount(torch.cat([batch.targets for batch in batches]), minlength=20)
    assert counts.min() > 5  # 20 of each are expected
    assert of_arrays(INPUTS, TARGETS, None, 4, 0)(torch.tensor(0)).mask is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_windows_lie_within_the_text(dtype: torch.dtype) -> None:
    text = torch.arange(14).to(dtype)
    batch_of = of_text(text, 10, 8, 0)
    firsts = set()
    for step in range(20):
        batch = batch_of(torch.tensor(step))
        assert batch.inputs.shape == batch.targets.shape == (8, 10)
        assert batch.inputs.dtype == torch.int64
        assert torch.equal(batch.targets, batch.inputs + 1)
        assert torch.equal(batch.inputs - batch.inputs[:, :1], torch.arange(10).expand(8, 10))
        firsts |= set(batch.inputs[:, 0].tolist())
    assert firsts == {0, 1, 2, 3}  # the last target of window 3 is the last token
    assert of_text(text[:11], 10, 1, 0)(torch.tensor(0)).targets[0, -1] == 10
    with pytest.raises(DataError, match="10 tokens"):
        of_text(text[:10], 10, 1, 0)
