"""What the ops compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(x: Tensor, like: Tensor | None = None) -> torch.dtype:
    """float64 if x is float64 and float32 otherwise; complex if `like` is."""
    complex_ = like is not None and like.is_complex()
    if x.dtype == torch.float64:
        return torch.complex128 if complex_ else torch.float64
    return torch.complex64 if complex_ else torch.float32
