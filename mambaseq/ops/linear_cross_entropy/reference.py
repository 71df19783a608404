"""The definition: all logits, then their cross-entropy, in float64 if they are float64 and in float32 otherwise."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear_cross_entropy.arguments import LossArguments


def run(arguments: LossArguments) -> Any:
    """(loss,)."""
    return (loss_of(*arguments),)


def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The sum of the cross-entropies, a scalar in the working precision: hidden `(rows, d_model)`, weight `(vocabulary,
    d_model)`, labels `(rows,)` int64."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(working_dtype(logits)), labels, ignore_index=ignore_index, reduction="sum")
