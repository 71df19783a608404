"""What a data set teaches."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyTokens, TinyValues

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData
from mambaseq.data.purpose import task_of
from mambaseq.errors import ConfigError


class Examples(TinyTokens):
    def __init__(self, first: Batch) -> None:
        super().__init__()
        self.first = first

    def train(self) -> list[Batch]:  # type: ignore[override]
        return [self.first]


IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.mark.parametrize(
    ("data", "task"),
    [
        (TinyTokens(), "next_token"),
        (TinyValues(), "values"),
        (Examples(Batch(IDS[:, :-1], torch.tensor([[1, -100, 1, 5]]))), "next_token"),
        (Examples(Batch(IDS, torch.tensor([[0, 1, 1, 0, 2]]))), "labels"),
        (Examples(Batch(IDS, torch.tensor([[-100, 1, -100, 1, -100]]))), "labels"),  # masked tokens
        (Examples(Batch(IDS, torch.tensor([2]))), "classes"),
        (Examples(Batch(torch.zeros(1, 5, 2), torch.tensor([[0, 1, 1, 0, 2]]))), "labels"),
    ],
)
def test_the_first_sequence_shows_the_task(data: SequenceData, task: str) -> None:
    assert task_of(data) == task


def test_a_data_set_says_it_itself() -> None:
    data = TinyTokens()
    data.task = "labels"
    assert task_of(data) == "labels"
    data.task = "label"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"TinyTokens\.task is 'label'\. It is one of"):
        task_of(data)
