"""The selective scan of one long sequence in float64, to check contenders from the first position to the last: where a
GPU cuts time into segments, errors show after the first segment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import selective_scan

# that the sequence is cut into at most, to run side by side: the steps of each are taken 256 at a time
SEGMENTS = 256
# elements of x that are checked
CHECKED = 2**22
# channels that are checked. With 16 states each, the states of a step of all segments are 2 MiB in float64 for 64
# channels, and the scan holds a dozen such tensors of 64 steps, 1.5 GiB
FEWEST, MOST = 4, 64


def first_channels(length: int, d_state: int) -> Callable[[Tensor], Tensor]:
    """The part that is checked: all positions of some channels, and all of B and C `(1, length, d_state)`."""
    channels = max(FEWEST, min(MOST, CHECKED // length))

    def part(tensor: Tensor) -> Tensor:
        if tensor.ndim < 3:
            return tensor[:channels]
        return tensor if tensor.shape[-1] == d_state else tensor[..., :channels]

    return part


def long_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor | None = None
) -> Tensor:
    """`selective_scan` with softplus at batch 1, with gradients: the segments as a batch, from the states that enter
    them. Those follow from the segments' own final states, and decay by exp(A Σ dt') over a segment."""
    count = math.gcd(x.shape[1], SEGMENTS)

    def cut(value: Tensor) -> Tensor:
        return value.reshape(count, -1, value.shape[-1])

    x, dt, B, C = cut(x), cut(dt), cut(B), cut(C)
    options: dict[str, Any] = {"dt_bias": dt_bias, "dt_softplus": True, "backend": "torch"}
    _, own = selective_scan(x, dt, A, B, C, **options)
    decay = torch.exp(A * F.softplus(dt + dt_bias).sum(1)[..., None])
    states = [torch.zeros_like(own[0])]
    for final, kept in zip(own[:-1], decay[:-1], strict=True):
        states.append(kept * states[-1] + final)
    entering = torch.stack(states)
    y, _ = selective_scan(x, dt, A, B, C, D=D, z=None if z is None else cut(z), initial_state=entering, **options)
    return y.view(1, -1, y.shape[-1])
