"""Whether an op may go past PyTorch's operator wrappers, which cost more than a short kernel does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def is_eager(*values: Any) -> bool:
    """Whether plain tensors are computed with, which nobody watches: no compiler, no tensors without numbers."""
    return not torch.compiler.is_compiling() and all(
        type(value) in (Tensor, Parameter) for value in values if isinstance(value, Tensor)
    )
