"""What a stretch of time does to the state of a time-invariant system; see `mambaseq.ops.selective_scan.ends`. Weights
are powers of one decay, so that a sum over positions is a product with a table of them, and one over the blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.chunks import padded
from mambaseq.ops.dtypes import without_autocast, working_dtype

# positions that the table is for
_STEPS = 512


def state_behind(x: Tensor, log_decay: Tensor, B: Tensor) -> Tensor:
    """The state `(batch, channels, d_state)` after x `(batch, length, channels)`, from zeros. log_decay, B `(channels,
    d_state)`: of a step. Without gradients."""
    return _summed(x.detach().flip(1), log_decay) * B.detach()


def gradient_before(dy: Tensor, log_decay: Tensor, C: Tensor, z: Tensor | None = None) -> Tensor:
    """The gradient of the state before these positions, `(batch, channels, d_state)`, that dy `(batch, length,
    channels)`, of their outputs gated by z, makes. log_decay, C `(channels, d_state)`: of a step."""
    wide = working_dtype(dy)
    values = dy.detach().to(wide)
    if z is not None:
        values = values * F.silu(z.detach().to(wide))
    found = _summed(values, log_decay) * torch.exp(log_decay.detach()) * C.detach()
    return 2 * found.conj().resolve_conj() if found.is_complex() else found


def decay(log_decay: Tensor, length: int) -> Tensor:
    """What so many positions decay a state by, `(channels, d_state)`."""
    return _powers(log_decay, torch.tensor([length], device=log_decay.device))[0].to(log_decay.dtype)


def _powers(log_decay: Tensor, steps: Tensor) -> Tensor:
    """`(steps, channels, d_state)`, in float64: the angle of many steps may be thousands of turns."""
    exact = log_decay.detach().to(torch.complex128 if log_decay.is_complex() else torch.float64)
    return torch.exp(steps.double()[:, None, None] * exact)


def _summed(values: Tensor, log_decay: Tensor) -> Tensor:
    """The sum over positions t of `values[:, t]` times the decay of t steps."""
    length = values.shape[1]
    wide = working_dtype(values, log_decay)
    steps = min(_STEPS, length)
    blocks = -(-length // steps)
    in_blocks = padded(values.to(working_dtype(values)), 1, blocks * steps).unflatten(1, (blocks, steps))
    numbers = torch.arange(max(steps, blocks), device=values.device)
    table = _powers(log_decay, numbers[:steps]).to(wide)
    if table.is_complex():
        table = torch.view_as_real(table).flatten(2)  # (steps, channels, numbers)
    with without_autocast(values.device.type):
        inner = torch.einsum("bktc,tcn->bkcn", in_blocks, table)
    if wide.is_complex:
        inner = torch.view_as_complex(inner.unflatten(-1, (-1, 2)).contiguous())
    return (inner * _powers(log_decay, steps * numbers[:blocks]).to(wide)).sum(1)
