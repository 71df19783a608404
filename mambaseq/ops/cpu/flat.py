"""Tensors as the flat float32 arrays that Numba kernels work on.

Kernels get one-dimensional contiguous arrays and compute offsets themselves. So each is compiled once and vectorised,
whichever slice of a larger tensor it is given.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_frees_storages = False


def let_storages_be_freed() -> None:
    """Have no array hold a tensor's storage at its size, for the whole process: sharded weights (FSDP) free what they
    have gathered, which PyTorch refuses of what it has once given to NumPy."""
    global _frees_storages
    _frees_storages = True


class _Lent:
    """What NumPy asks of memory that is not its own; keeps the tensor."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self.__array_interface__ = {
            "data": (value.data_ptr(), False),
            "shape": (value.numel(),),
            "typestr": "<f4",
            "version": 3,
        }


def _array(value: Tensor) -> np.ndarray:
    """A contiguous float32 tensor as an array of one dimension."""
    if _frees_storages and value.numel():
        return np.asarray(_Lent(value))
    return value.numpy().reshape(-1)


def flat(value: Tensor | None) -> np.ndarray:
    """All elements of a tensor in float32; a single zero for None. Shares memory where it can."""
    if value is None:
        return np.zeros(1, dtype=np.float32)
    return _array(value.detach().to(torch.float32).contiguous())


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
        return _array(x.detach()), channels
    rows = x.detach().float().reshape(-1, channels)
    if (rows.stride(1) != 1 and channels > 1) or rows.stride(0) < channels:
        rows = rows.contiguous()
    stride = rows.stride(0) if rows.shape[0] > 1 else channels
    span = (rows.shape[0] - 1) * stride + channels
    return _array(torch.as_strided(rows, (span,), (1,))), stride


def scratch(size: int) -> np.ndarray:
    """Uninitialised float32 working memory for one thread."""
    return np.empty(size, dtype=np.float32)
