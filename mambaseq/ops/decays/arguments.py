"""The arguments of `mambaseq.ops.log_decays`, checked once for every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DecayArguments(NamedTuple):
    """What every backend receives; shapes and meaning as in `mambaseq.ops.log_decays`."""

    f: Tensor
    A_log: Tensor
    dt_bias: Tensor
    lower_bound: float | None = None

    @property
    def wants_final_state(self) -> bool:
        """Never: g is all that there is."""
        return False


def check(arguments: DecayArguments) -> None:
    """Raise ValueError where a shape, a dtype or a device does not fit."""
    f, A_log, dt_bias, _ = arguments
    for name, value in (("f", f), ("A_log", A_log), ("dt_bias", dt_bias)):
        if not value.is_floating_point():
            raise ValueError(f"{name} must be real floating-point numbers, not {value.dtype}")
        if value.device != f.device:
            raise ValueError(f"{name} is on {value.device}, but f is on {f.device}")
    if f.ndim < 1 or dt_bias.shape != f.shape[-1:]:
        raise ValueError(f"dt_bias must have the last axis of f {tuple(f.shape)}, not {tuple(dt_bias.shape)}")
    if A_log.ndim != 1 or len(A_log) == 0 or len(dt_bias) % len(A_log):
        raise ValueError(f"A_log must be (heads,), which divide {len(dt_bias)} channels, not {tuple(A_log.shape)}")
