"""Implementations of other packages, if installed; none is needed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch


@functools.cache
def _load(name: str) -> ModuleType | str:
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        return importlib.import_module(name)
    except Exception as error:  # compiled for another torch, or a dependency is missing
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{name} cannot be imported: {first}"


def find(name: str, device: torch.device) -> tuple[ModuleType | None, str]:
    """A peer's module, or None and why it cannot take part. All of them run on CUDA only."""
    if device.type != "cuda":
        return None, f"{name.partition('.')[0]} runs on CUDA only"
    module = _load(name)
    return (None, module) if isinstance(module, str) else (module, "")
