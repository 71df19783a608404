"""The recipes' draws by hand, and each recipe at a tiny scale on made data."""

from __future__ import annotations

import numpy as np
import torch
from mambaseq_dna.recipes.common import MASK, Stretches, other_strand, stretches_of, tiles
from mambaseq_dna.tokenizer import N


def test_windows_are_drawn_within_stretches_of_their_class() -> None:
    tokens = torch.randint(0, 4, (100,), dtype=torch.uint8)
    places = [np.array([[0, 10], [20, 23], [30, 60]]), np.array([[60, 100]])]
    source = Stretches(tokens, places, 8)
    ids, label = source.draw(0, torch.arange(4000), flip=False)
    where = {tuple(tokens[i : i + 8].tolist()): i for i in range(93)}
    starts = torch.tensor([where[tuple(row)] for row in ids.tolist()])
    assert set(starts[label == 0].tolist()) == {0, 1, 2, *range(30, 53)}
    assert set(starts[label == 1].tolist()) == set(range(60, 93))
    assert 0.45 < label.float().mean() < 0.55
    both, _ = source.draw(0, torch.arange(4000))
    same = (both == ids).all(1) | (both == other_strand(ids)).all(1)
    assert same.all()
    assert not torch.equal(both, ids)


def test_masks_hide_as_bert_does() -> None:
    source = Stretches(torch.randint(0, 4, (5000,), dtype=torch.uint8), [np.array([[0, 5000]])], 100)
    batch = source.masked(200, 0)(torch.tensor(3))
    assert batch.targets is not None
    asked = batch.targets != -100
    assert 0.13 < asked.float().mean() < 0.17
    assert 0.76 < (batch.inputs[asked] == MASK).float().mean() < 0.84
    assert torch.equal(batch.inputs[~asked], source.draw(0, torch.arange(600, 800))[0][~asked])


def test_stretches_and_tiles_leave_out_n() -> None:
    tokens = torch.tensor([0, 1, N, 2, 3, 0, 1, N, N, 2], dtype=torch.uint8)
    places = stretches_of(tokens, np.array([0, 5, 10]))
    assert places.tolist() == [[0, 2], [3, 5], [5, 7], [9, 10]]
    starts, labels = tiles([places, np.array([[0, 9]])], 2)
    assert starts.tolist() == [0, 3, 5, 0, 4, 6]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
