"""What heads share: pooling, and the call."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pool = Literal["mean", "last", "first"]


def pool(hidden: Tensor, how: Pool, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """One vector a sequence: `(sequences, d_model)` fp32 from hidden `(batch, length, d_model)`.

    mean: over the positions that are real (mask, right padding) or over each packed sequence. last: the last real
    position. first: position 0. An empty packed sequence gives zeros.
    """
    if cu_seqlens is not None:
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        if how != "mean":
            ends = cu_seqlens[1:].long() - 1 if how == "last" else cu_seqlens[:-1].long()
            rows = hidden[0, ends.clamp(0, hidden.shape[1] - 1)].float()
            return torch.where(lengths[:, None] > 0, rows, 0.0)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
        total = hidden.new_zeros(len(lengths), hidden.shape[-1], dtype=torch.float32)
        return total.index_add(0, owner, hidden[0].float()) / lengths.clamp(min=1)[:, None]
    if how == "first":
        return hidden[:, 0].float()
    if mask is None:
        return hidden.float().mean(1) if how == "mean" else hidden[:, -1].float()
    lengths = mask.sum(1)
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), (lengths - 1).clamp(min=0)].float()
    return (hidden.float() * mask[..., None]).sum(1) / lengths.clamp(min=1)[:, None]
