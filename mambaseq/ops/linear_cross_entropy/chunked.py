"""The loss in chunks of rows whose logits are computed again in the backward pass, in PyTorch, on any device.

On a CPU rows without a label are left out."""

from __future__ import annotations

from typing import Any

import torch

from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear_cross_entropy.arguments import LossArguments
from mambaseq.ops.linear_cross_entropy.reference import loss_of

# rows x vocabulary above which the loss is taken in chunks: 2^24 fp32 logits are 64 MiB
CHUNK_ELEMENTS = 1 << 24


def why_not_cpu(arguments: LossArguments) -> str | None:
    """The reason why this cannot run these arguments, or None."""
    device = arguments.hidden.device
    return None if device.type == "cpu" else f"hidden is on {device}"


def run(arguments: LossArguments) -> Any:
    """(loss,)."""
    hidden, weight, labels, ignore_index = arguments
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere counting waits for the device
        counts = labels != ignore_index
        if not bool(counts.all()):
            hidden, labels = hidden[counts], labels[counts]
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    if len(labels) <= rows:
        return (loss_of(hidden, weight, labels, ignore_index),)
    total = hidden.new_zeros((), dtype=working_dtype(hidden))
    for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
        total = total + torch.utils.checkpoint.checkpoint(
            loss_of, h, weight, y, ignore_index, use_reentrant=False, preserve_rng_state=False
        )
    return (total,)
