"""What a dataset teaches, and so what a model trained on it predicts."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError, shown

Task = Literal["next_token", "masked", "labels", "classes", "multilabels", "values", "next_values"]
TASKS: tuple[str, ...] = get_args(Task)
"""next_token: each position asks for the token after it. masked: some positions ask for the token that is hidden there;
a dataset must declare this. labels: a label for each position or bin. classes: a label for each sequence. multilabels:
any of several labels, for each sequence, position or bin. values: numbers, for each sequence, position or bin.
next_values: each position of a signal asks for the next values of all channels."""

NEXT = ("next_token", "next_values")

_LOOKED_AT = 5


def task_of(data: SequenceData) -> Task:
    """The task of a dataset (after `setup`): what it declares, otherwise what a few training sequences show. One
    sequence is not enough: it may have no known target, or labels that happen to be its next tokens.

    Streams give no examples before their place is set. They, and datasets that show nothing, count as next-token or
    next-value data, unless they have class names. Raises ConfigError for a task that is not in `TASKS`.
    """
    if data.task is not None:
        if data.task not in TASKS:
            raise ConfigError(f"{type(data).__name__}.task is {shown(data.task)}. It is one of: {', '.join(TASKS)}.")
        return data.task
    train = data.train()
    found: Task | None = None
    silent: Task = "classes" if data.class_names else "next_token"
    if isinstance(train, torch.utils.data.IterableDataset):
        return silent
    spread = dict.fromkeys(number * (len(train) - 1) // (_LOOKED_AT - 1) for number in range(_LOOKED_AT))
    for index in spread if len(train) else ():
        if (example := train[index]).targets is None:
            continue
        if example.targets.is_floating_point():
            follows = _follows(example) if example.per_token else False
            if follows is False:
                return "values"
            found, silent = ("next_values" if follows else found), "values"
            continue
        if example.kind == "multilabels":
            return "multilabels"
        if not example.per_token:
            return "classes"
        follows = _follows(example)
        if follows is False:
            return "labels"
        found = "next_token" if follows else found
        silent = "labels" if data.class_names else "next_token"
    return found or silent


def asks_for_the_next(data: SequenceData, batch: Batch) -> bool:
    """Whether a dataset's batch asks for next tokens or next values: by `task_of` and, if the task is not declared, by
    the batch too."""
    if data.task is not None:
        return data.task in NEXT
    return batch.per_token and is_next_token(batch) and task_of(data) in NEXT


def is_next_token(batch: Batch) -> bool:
    """Whether every target is the next input of the same sequence. Targets belong to positions, padded, packed or
    neither: labels for ids, or values for a signal."""
    return bool(_follows(batch))


def _follows(batch: Batch) -> bool | None:
    """The same; None if no target is known."""
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
    return torch.equal(targets[scored], following[scored]) if bool(scored.any()) else None
