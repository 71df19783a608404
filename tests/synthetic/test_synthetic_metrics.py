"""Metrics of answers of a few tokens, by hand."""

from __future__ import annotations

import torch
from mambaseq_synthetic.metrics import AccuracyByLength, SequenceAccuracy
from mambaseq_synthetic.selective_copying import draw

from mambaseq.batch import Batch
from mambaseq.metrics.likelihood import TokenAccuracy
from mambaseq.models import ModelOutput

N = -100


def output(guesses: list[list[int]]) -> ModelOutput:
    return ModelOutput(logits=torch.nn.functional.one_hot(torch.tensor(guesses), 5).float())


def test_whole_sequences() -> None:
    metric = SequenceAccuracy()
    targets = torch.tensor([[N, 1, 2], [N, 3, 4], [N, N, N]])  # right, one wrong, nothing asked
    metric.update(output([[4, 1, 2], [4, 3, 3], [0, 0, 0]]), Batch(inputs=torch.zeros_like(targets), targets=targets))
    targets = torch.tensor([[N, 0], [N, 2]])
    metric.update(output([[1, 0], [1, 2]]), Batch(inputs=torch.zeros_like(targets), targets=targets))
    assert float(metric.compute()) == 3 / 4


def test_whole_sequences_when_packed() -> None:
    metric = SequenceAccuracy()
    targets = torch.tensor([[N, 1, 2, N, 3]])  # sequences of 3, 0 and 2 tokens
    bounds = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    batch = Batch(inputs=torch.zeros_like(targets), targets=targets, cu_seqlens=bounds)
    metric.update(output([[0, 1, 4, 0, 3]]), batch)
    assert float(metric.compute()) == 1 / 2


def test_by_length() -> None:
    metric = AccuracyByLength()
    targets = torch.tensor([[N, N, 1, 2], [N, 3, N, N]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    metric.update(output([[0, 0, 1, 1], [0, 3, 0, 0]]), Batch(torch.zeros_like(targets), targets, mask))
    targets = torch.tensor([[N, N, N, N, N, N, 4], [N, N, N, N, N, N, 0]])
    guesses = [[0] * 6 + [3], [0] * 6 + [0]]
    metric.update(output(guesses), Batch(torch.zeros_like(targets), targets))
    assert metric.compute().tolist() == [[2, 1, 1], [4, 4, 0.5]]


def test_token_accuracy_sees_the_answers_alone() -> None:
    inputs, labels = draw(0, torch.arange(4), length=20, n_data=4, vocab_size=5)
    guesses = labels.clamp(min=0)  # noise elsewhere, which is no target
    guesses[0, -1] = guesses[0, -1] % 3 + 1  # one of 16 answers wrong
    for metric, expected in ((TokenAccuracy(), 15 / 16), (SequenceAccuracy(), 3 / 4)):
        metric.update(output(guesses.tolist()), Batch(inputs, labels))
        assert float(metric.compute()) == expected
