"""Made-up sequences that fit a model, for parts that no configuration of their domain uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.conditions import row
from mambaseq.encoders import ConditionTable
from mambaseq.models import SequenceModel

LENGTHS = (11, 4, 1, 7)
CHANNELS, CODES, TOKENS, CLASSES, CONDITIONS = 2, 2, 6, 3, 3


def sequences(model: SequenceModel, signal: bool, lengths: Sequence[int] = LENGTHS) -> list[Batch]:
    """Batches of one that fit the model. Some targets are unknown, and all of the last sequence's.

    signal: the inputs are `CHANNELS` continuous channels, not ids below `TOKENS` - 1. Raises AttributeError for a head
        of values or several labels whose number is unknown (no `n_channels`, nor a map `linear`).
    """
    found, head = [], cast(Any, model.head)
    for number, n in enumerate(lengths):
        codes = (getattr(model.encoder, "n_codes", 0),) if getattr(model.encoder, "n_codes", 0) else ()
        inputs = torch.randn(1, n, CHANNELS) if signal else torch.randint(0, TOKENS - 1, (1, n, *codes))
        condition = _condition_of(model, number)
        targets = _targets_of(head, number, n, number == len(lengths) - 1)
        item = Batch(inputs=inputs, targets=targets, condition=condition, stride=head.stride)
        item.target_of = "code" if getattr(head, "codes", 0) else "position" if head.per_token else "sequence"
        found.append(item)
    return found


def _condition_of(model: SequenceModel, number: int) -> Tensor | None:
    """Some that the model has, now and then without one of several."""
    table = getattr(model.encoder, "condition", None)
    if table is None:
        return None
    if not isinstance(table, ConditionTable) or table.single:
        return torch.tensor([number % CONDITIONS])
    ids = [None if number == place + 1 else (number + place) % size for place, size in enumerate(table.sizes)]
    numbers = [None if number == 0 else mean + number - 1.5 for mean in table.means]
    return torch.tensor([row(ids, numbers)])


def _targets_of(head: Any, number: int, length: int, last: bool) -> Tensor:
    shape: tuple[int, ...] = (1, -(-length // head.stride)) if head.per_token else (1,)
    if head.learns == "labels" and not head.per_token:
        return torch.tensor([-100 if last else number % CLASSES])
    if getattr(head, "codes", 0):
        shape = (*shape, head.codes)
    if head.learns != "labels":
        shape = (*shape, getattr(head, "n_channels", head.linear.out_features))
    unknown = torch.rand(shape) < (1 if last else 0.3)
    if head.learns == "values":
        return torch.where(unknown, float("nan"), torch.randn(shape))
    classes = TOKENS if head.learns == "labels" else 2
    return torch.where(unknown, -100, torch.randint(0, getattr(head, "n_labels", None) or classes, shape))
