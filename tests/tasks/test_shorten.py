"""Length warm-up: batches with a target for every token are folded, labelled and measured sequences are cut."""

from __future__ import annotations

import pytest
import torch

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError
from mambaseq.tasks.task import shorten


def test_next_token_batches_are_folded() -> None:
    ids = torch.arange(2 * 7).reshape(2, 7)
    batch = shorten(Batch(inputs=ids, targets=ids + 1, condition=torch.tensor([5, 6])), 3)
    assert batch.inputs.tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9], [10, 11, 12]]
    assert batch.targets is not None
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert batch.condition is not None
    assert batch.condition.tolist() == [5, 5, 6, 6]
    rows = torch.tensor([[1, 2], [3, 4]])  # of several conditions: no positions, though they have two dimensions
    several = shorten(Batch(inputs=ids, targets=ids + 1, condition=rows), 3)
    assert several.condition is not None
    assert several.condition.tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_bins_stay_whole() -> None:
    """Eleven positions in bins of three at five positions: three windows of one bin, what is left over falls away."""
    bins = torch.arange(4.0).view(1, 4, 1)
    batch = shorten(Batch(torch.arange(11)[None], bins, stride=3), 5)
    assert batch.inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert batch.targets is not None
    assert batch.targets.flatten().tolist() == [0, 1, 2]
    assert (batch.per_token, batch.stride) == (True, 3)
    whole = Batch(torch.arange(11)[None], bins, stride=3)
    assert shorten(whole, 11) is whole


@pytest.mark.parametrize("targets", [torch.tensor([1, 0]), torch.randn(2), torch.randn(2, 3), torch.randn(2, 8)])
def test_labels_and_values_stay_with_a_cut_sequence(targets: torch.Tensor) -> None:
    signal = torch.randn(2, 8, 2)
    batch = shorten(Batch(inputs=signal, targets=targets, mask=torch.ones(2, 8, dtype=torch.bool)), 3)
    assert torch.equal(batch.inputs, signal[:, :3])
    assert batch.targets is targets
    assert batch.mask is not None
    assert batch.mask.shape == (2, 3)


def test_packs_are_refused_and_short_batches_left() -> None:
    ids = torch.zeros(1, 6, dtype=torch.long)
    packed = Batch(inputs=ids, targets=ids, cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32))
    with pytest.raises(ConfigError, match="length_warmup"):
        shorten(packed, 3)
    assert shorten(packed, 6) is packed
