"""The shapes of one step: kernels that are given rows of other sizes than the state's would write beyond it."""

from __future__ import annotations

from torch import Tensor


def check_step(op: str, *given: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """given: name, tensor or None, and the shape that the state's calls for. Raises ValueError for another one."""
    for name, value, shape in given:
        if value is not None and value.shape != shape:
            raise ValueError(f"{op}: {name} must be {tuple(shape)}, as the state calls for, not {tuple(value.shape)}")
