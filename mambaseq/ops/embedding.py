"""A lookup table whose gradient is summed in a fixed order on a GPU, too.

Without `torch.use_deterministic_algorithms`, PyTorch 2.11 sums the gradients of a row by atomics, in any order. Here a
table of few rows (bases, bytes) is summed by a matrix product with the lookups as zeros and ones, rounded as
`torch.set_float32_matmul_precision` says; a table of many rows as PyTorch does after indexing: sorted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.ops.dtypes import working_dtype

# rows up to which the product is taken, and numbers that its first factor has at most
_FEW, _ONES = 2048, 2**26


class Embedding(nn.Embedding):
    """`nn.Embedding(num_embeddings, embedding_dim)`."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)

    def forward(self, input: Tensor) -> Tensor:
        """ids `(...)` to `(..., embedding_dim)`."""
        weight = self.weight
        plain = type(weight) in (nn.Parameter, Tensor)  # not sharded, say
        if plain and weight.is_cuda and weight.requires_grad and torch.is_grad_enabled():
            return looked_up(input, weight)
        return super().forward(input)


def looked_up(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of a weight `(rows, features)` by ids `(...)`. Nothing waits for the device, so it can be captured."""
    if weight.shape[0] <= _FEW:
        return _FewRows.apply(ids, weight)
    # widened, as the sums of half-precision weights would be rounded at each summand
    return weight.to(working_dtype(weight))[ids.long()].to(weight.dtype)


class _FewRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            return None, _summed(ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1]), ctx.rows)


def _summed(ids: Tensor, values: Tensor, rows: int) -> Tensor:
    """The values `(n, features)` of each id summed, `(rows, features)`."""
    total = values.new_zeros(rows, values.shape[1], dtype=working_dtype(values))
    known, many = torch.arange(rows, device=ids.device)[:, None], _ONES // rows  # known (rows, 1)
    for some, theirs in zip(ids.split(many), values.split(many), strict=True):
        total += (known == some).to(theirs.dtype) @ theirs
    return total.to(values.dtype)
