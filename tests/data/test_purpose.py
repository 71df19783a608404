"""What a data set teaches."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyTokens, TinyValues

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData
from mambaseq.data.purpose import asks_for_the_next, is_next_token, task_of
from mambaseq.errors import ConfigError
from mambaseq.models import build_model
from mambaseq.tasks.fitting import check_data


class Examples(TinyTokens):
    def __init__(self, *examples: Batch, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.examples, self.class_names = examples, names

    def train(self) -> list[Batch]:  # type: ignore[override]
        return list(self.examples)


SIGNAL = torch.arange(10.0).view(1, 5, 2).sin()
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
        (Examples(Batch(IDS, torch.tensor([[1, 0, 1]]), target_of="sequence")), "multilabels"),
        (Examples(Batch(IDS, torch.ones(1, 5, 2, dtype=torch.long))), "multilabels"),
        (Examples(Batch(IDS, torch.tensor([[1, 0, 1]]), stride=2)), "labels"),
        (Examples(Batch(IDS, torch.zeros(1, 3, 2), stride=2)), "values"),
        (Examples(Batch(SIGNAL[:, :-1], SIGNAL[:, 1:])), "next_values"),
        (Examples(Batch(SIGNAL[:, :-1], SIGNAL[:, 1:, :1])), "values"),
        (Examples(Batch(SIGNAL[:, :-1], torch.full((1, 4, 2), float("nan")))), "values"),
        # two documents, of which the first one's last target is not the second one's first token; a padded one
        (Examples(Batch(IDS, torch.tensor([[1, 6, 1, 5, 0]]), cu_seqlens=torch.tensor([0, 2, 2, 5]))), "next_token"),
        (
            Examples(Batch(IDS, torch.tensor([[1, 4, 2, -100, 7]]), torch.tensor([[True] * 3 + [False] * 2]))),
            "next_token",
        ),
        (Examples(Batch(IDS, torch.tensor([[1, 6, 1, 5, 0]]))), "labels"),
        (Examples(Batch(torch.zeros(1, 5, 2), torch.tensor([[0, 1, 1, 0, 2]]))), "labels"),
    ],
)
def test_the_first_sequence_shows_the_task(data: SequenceData, task: str) -> None:
    assert task_of(data) == task


NEXT = Batch(IDS[:, :-1], IDS[:, 1:])
LABELS = Batch(IDS, torch.tensor([[0, 1, 1, 0, 2]]))
SILENT = Batch(IDS, torch.full_like(IDS, -100))
ONE = Batch(IDS[:, :1], IDS[:, :1])


@pytest.mark.parametrize(
    ("data", "task"),
    [
        (Examples(NEXT, LABELS, LABELS), "labels"),  # the first is one by chance
        (Examples(*[NEXT] * 6, LABELS), "labels"),
        (Examples(SILENT, NEXT), "next_token"),
        (Examples(ONE, SILENT, NEXT), "next_token"),
        (Examples(SILENT, LABELS, names=("a", "b", "c")), "labels"),
        (Examples(SILENT), "next_token"),
        (Examples(SILENT, names=("a", "b", "c")), "labels"),
        (Examples(Batch(IDS), names=("a", "b")), "classes"),
        (Examples(Batch(IDS)), "next_token"),
        (Examples(), "next_token"),
    ],
)
def test_one_sequence_alone_may_lie(data: Examples, task: str) -> None:
    assert task_of(data) == task
    if data.examples and data.examples[0].targets is not None:
        assert asks_for_the_next(data, NEXT) == (task == "next_token")
    data.task = "classes"
    assert task_of(data) == "classes"
    assert not asks_for_the_next(data, NEXT)


def test_labels_that_follow_by_chance_need_no_causal_model() -> None:
    model = build_model(
        {
            "d_model": 8,
            "encoder": {"name": "tokens", "vocab_size": 7},
            "backbone": {"name": "bidirectional", "n_layers": 1},
            "mixer": {"name": "mamba"},
            "head": {"name": "lm", "vocab_size": 7},
        }
    )
    check_data(model, Examples(NEXT, LABELS), "labels", {})
    with pytest.raises(ConfigError, match="causal"):
        check_data(model, Examples(NEXT, NEXT), "tokens", {})


def test_samples_that_follow_are_seen_in_signals_too() -> None:
    signal = torch.randn(1, 6, 2)
    following = signal[:, 1:].clone()
    following[0, 2] = float("nan")
    assert is_next_token(Batch(signal[:, :-1], following))
    assert not is_next_token(Batch(signal[:, :-1], following + 1))
    assert not is_next_token(Batch(signal[:, :-1], following[..., :1]))


def test_a_data_set_says_it_itself() -> None:
    data = TinyTokens()
    data.task = "labels"
    assert task_of(data) == "labels"
    data.task = "label"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"TinyTokens\.task is 'label'\. It is one of"):
        task_of(data)
