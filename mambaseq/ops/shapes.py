"""The shapes of one step: kernels that are given other sizes than the state's would read and write beyond them."""

from __future__ import annotations

from torch import Tensor


def check_step(op: str, *given: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """given: name, tensor or None, and the shape that the state's calls for. Raises ValueError for another one."""
    for name, value, shape in given:
        if value is not None and value.shape != shape:
            raise ValueError(f"{op}: {name} must be {tuple(shape)}, as the state calls for, not {tuple(value.shape)}")


def check_divide(op: str, name: str, groups: int, of: int) -> None:
    """Raises ValueError unless `of` heads or channels are shared by so many groups."""
    if groups < 1 or of % groups:
        raise ValueError(f"{op}: {name} has {groups} groups, which must divide {of}, as the state calls for")
