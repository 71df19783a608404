"""The device that a command line names."""

from __future__ import annotations

import torch

from mambaseq.errors import ConfigError


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
            f"The device {name!r} cannot be used: {reason}. Give --device cpu, or leave it out to take the GPU if "
            f"there is one."
        ) from error
    return device
