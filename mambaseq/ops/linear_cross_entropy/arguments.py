"""The arguments of the linear map with cross-entropy, checked once for every backend, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class LossArguments(NamedTuple):
    """What every backend receives; shapes and meaning as in `mambaseq.ops.linear_cross_entropy`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ignore_index: int = -100

    @property
    def wants_final_state(self) -> bool:
        """Never: the loss is all that there is."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """What the logits are in: autocast's dtype where it is on, else the hidden rows'."""
        kind = self.hidden.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.hidden.dtype


def check(arguments: LossArguments) -> None:
    """Raise ValueError where a shape, a dtype or a device does not fit."""
    hidden, weight, labels, _ = arguments
    if not hidden.is_floating_point() or hidden.ndim != 2:
        raise ValueError(f"hidden must be (rows, d_model), floating-point, not {tuple(hidden.shape)} {hidden.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"weight must be (vocab, d_model={hidden.shape[1]}), not {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be (rows={len(hidden)},) int64, not {tuple(labels.shape)} {labels.dtype}")
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"weight is {weight.dtype}, but hidden is {hidden.dtype} and there is no autocast")
    for name, value in (("weight", weight), ("labels", labels)):
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, but hidden is on {hidden.device}")


def samples(device: torch.device) -> Iterator[tuple[str, LossArguments]]:
    """Small float32 inputs that use every argument."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 7, generator=draw).to(device) for n in (13, 37))
    labels = torch.randint(0, 37, (13,), generator=draw).to(device)
    yield "every row", LossArguments(hidden, weight, labels)
    ignored = torch.where(torch.arange(13, device=device) % 3 == 0, 5, labels)
    yield "ignored rows", LossArguments(hidden, weight, ignored, 5)
