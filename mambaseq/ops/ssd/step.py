"""One step of the state-space dual for decode loops: length 1, the state changed in place; one kernel on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import step_gpu


def ssd_update_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One step of `mambaseq.ops.ssd`; changes `state` in place.

    Args:
        state: `(batch, heads, head_dim, d_state)`, float32.
        x: `(batch, heads, head_dim)`.
        dt: `(batch, heads)`.
        A, D, dt_bias: `(heads,)`.
        B, C: `(batch, groups, d_state)`.

    Returns:
        y, the shape and dtype of x.
    """
    if (
        state.dtype == torch.float32
        and step_gpu.can_run(state, x, dt, A, B, C, D, dt_bias)
        and step_gpu.can_update(state)
    ):
        return step_gpu.ssd_update_(state, x, dt, A, B, C, D, dt_bias, dt_softplus)
    wide, heads = state.dtype, x.shape[1]
    dt, u = dt.to(wide), x.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    if dt_softplus:
        dt = F.softplus(dt)
    B, C = (M.to(wide).repeat_interleave(heads // M.shape[1], dim=1) for M in (B, C))
    state.mul_(torch.exp(dt * A.to(wide))[..., None, None]).add_((dt[..., None] * u)[..., None] * B[:, :, None])
    y = (state * C[:, :, None]).sum(-1)
    if D is not None:
        y = y + D.to(wide)[:, None] * u
    return y.to(x.dtype)
