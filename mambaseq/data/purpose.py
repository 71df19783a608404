"""What a data set teaches, which says what comes out of a model that was trained on it."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError, shown

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
            raise ConfigError(f"{type(data).__name__}.task is {shown(data.task)}. It is one of: {', '.join(TASKS)}.")
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
    """Whether every target is the input behind it, of the same sequence: targets are of positions, padded or packed or
    not, labels beside ids or values beside a signal."""
    assert batch.targets is not None
    targets, following = batch.targets[:, :-1], batch.inputs[:, 1:]
    if targets.shape != following.shape or targets.is_floating_point() != following.is_floating_point():
        return False
    scored = ~targets.isnan() if targets.is_floating_point() else targets != -100
    inside = torch.ones(targets.shape[:2], dtype=torch.bool, device=targets.device)
    if batch.mask is not None:
        inside &= batch.mask[:, 1:]
    if batch.cu_seqlens is not None:
        begins = batch.cu_seqlens[1:-1].long()
        inside[:, begins[(begins > 0) & (begins < batch.inputs.shape[1])] - 1] = False
    scored = scored & inside.view(*inside.shape, *[1] * (targets.dim() - 2))
    return bool(scored.any()) and torch.equal(targets[scored], following[scored])
