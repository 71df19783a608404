"""What a data set teaches, which says what comes out of a model that was trained on it."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError

Task = Literal["next_token", "labels", "classes", "values"]
TASKS: tuple[str, ...] = get_args(Task)
"""next_token: each position asks for the token behind it. labels: a label a position. classes: one a sequence. values:
numbers, a sequence or a position."""


def task_of(data: SequenceData) -> Task:
    """The task of a data set that is set up: what it says itself, else what its first training sequence shows.

    Streams cannot be asked for an example before they are placed: those without names of classes are taken for
    something that is to be continued. Raises ConfigError for a task that is none of `TASKS`.
    """
    if data.task is not None:
        if data.task not in TASKS:
            raise ConfigError(f"{type(data).__name__}.task is {data.task!r}. It is one of: {', '.join(TASKS)}.")
        return data.task
    train = data.train()
    stream = isinstance(train, torch.utils.data.IterableDataset)
    first = None if stream or len(train) == 0 else train[0]
    if first is None or first.targets is None:
        return "classes" if data.class_names else "next_token"
    if first.targets.is_floating_point():
        return "values"
    if not first.per_token:
        return "classes"
    return "next_token" if is_next_token(first) else "labels"


def is_next_token(batch: Batch) -> bool:
    """Whether every target is the input behind it: targets are `(batch, length)` int64."""
    assert batch.targets is not None
    if batch.inputs.dim() != 2:
        return False
    targets, following = batch.targets[:, :-1], batch.inputs[:, 1:]
    scored = targets != -100
    return bool(scored.any()) and torch.equal(targets[scored], following[scored])
