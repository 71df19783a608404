"""The device to run on, and the error for a full memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mambaseq.errors import ConfigError, UserError, shown


def choose_device(name: str | None) -> torch.device:
    """The device of this name, or the GPU if there is one. Raises ConfigError when it cannot be used here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"The device {shown(name)} cannot be used: {reason}. Give --device cpu, or leave it out to take the GPU if "
            f"there is one."
        ) from error
    return device


@contextlib.contextmanager
def memory_told(options: str) -> Iterator[None]:
    """Turn running out of memory into a UserError. options: what to lower, named in the message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not out_of_memory:
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0][:200].rstrip(".")
        raise UserError(f"There is not enough memory: {reason}. Lower {options}.") from error
