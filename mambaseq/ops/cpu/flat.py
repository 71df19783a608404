"""Tensors as the flat float32 arrays that Numba kernels work on.

Kernels get one-dimensional contiguous arrays and compute offsets themselves. So each is compiled once and vectorised,
whichever slice of a larger tensor it is given.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def flat(value: Tensor | None) -> np.ndarray:
    """All elements of a tensor in float32; a single zero for None. Shares memory where it can."""
    if value is None:
        return np.zeros(1, dtype=np.float32)
    return value.detach().to(torch.float32).contiguous().numpy().reshape(-1)


def rows_of(x: Tensor | None) -> tuple[np.ndarray, int]:
    """`(batch, length, channels)` → (array, stride): channel c of row i at `i * stride + c`.

    Shares memory with slices of the channels of a larger tensor. Stride 0 stands for None.
    """
    if x is None:
        return np.zeros(1, dtype=np.float32), 0
    channels = x.shape[-1]
    if x.numel() == 0:
        return np.zeros(1, dtype=np.float32), channels
    if x.dtype == torch.float32 and x.is_contiguous():
        return x.detach().numpy().reshape(-1), channels
    rows = x.detach().float().reshape(-1, channels)
    if (rows.stride(1) != 1 and channels > 1) or rows.stride(0) < channels:
        rows = rows.contiguous()
    stride = rows.stride(0) if rows.shape[0] > 1 else channels
    span = (rows.shape[0] - 1) * stride + channels
    return torch.as_strided(rows, (span,), (1,)).numpy(), stride


def scratch(size: int) -> np.ndarray:
    """Uninitialised float32 working memory for one thread."""
    return np.empty(size, dtype=np.float32)
