"""What the ops compute in."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def working_dtype(x: Tensor, like: Tensor | None = None) -> torch.dtype:
    """float64 if x is float64 and float32 otherwise; complex if `like` is."""
    complex_ = like is not None and like.is_complex()
    if x.dtype == torch.float64:
        return torch.complex128 if complex_ else torch.float64
    return torch.complex64 if complex_ else torch.float32


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Computes in the dtypes of what is given, under autocast too. Where that is off this does nothing, and leaves no
    trace in a graph."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
