"""Triton, for the kernels that run on NVIDIA and AMD GPUs, and on a CPU in its interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.eager import constant_to_compilers
from mambaseq.ops.gpu.compiling import tell_of_triton


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    tell_of_triton()
    return None


@constant_to_compilers
def why_not(device_type: str) -> str | None:
    """The reason why Triton kernels cannot run on tensors of this kind of device, or None.

    The answer is a constant to `torch.compile`, which need not trace the looking up of packages.
    """
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernels run on a GPU, the inputs are on {device_type}"
    return _missing()


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the GPU of x the current one, where kernels are launched."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
