"""What backends by other people's packages ask before they run: is it there, and does this machine compile it right."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

_HOPPER = 9  # major compute capability


@functools.cache
def installed(module: str) -> bool:
    """Whether a package is there, which is not imported."""
    return importlib.util.find_spec(module) is not None


def needs_gradient(arguments: Iterable[Any]) -> bool:
    """Whether anything that is to be computed from these arguments is differentiated."""
    tensors = (value for value in arguments if isinstance(value, Tensor))
    return torch.is_grad_enabled() and any(value.requires_grad for value in tensors)


@functools.cache
def gated_gradients_miscompiled(device: torch.device) -> bool:
    """Whether Triton compiles the backward pass of flash-linear-attention's gated kernels wrongly for this GPU."""
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return False
    version = TorchVersion(importlib.import_module("triton").__version__)
    return version >= "3.4.0" and version < "3.7.1"
