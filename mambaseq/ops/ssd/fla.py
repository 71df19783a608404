"""The state-space dual by flash-linear-attention's `chunk_simple_gla` (Yang et al., Triton kernels), where it can do
what is asked: states and packed sequences with gradients among it.

Taken only when asked for by name: its products round to the half precision of x, where others compute in float32.
The package is imported when it runs for the first time, never before.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.gpu.packages import gated_gradients_miscompiled, needs_gradient
from mambaseq.ops.ssd import packages
from mambaseq.ops.ssd.arguments import SsdArguments

_MODULE = "fla.ops.simple_gla"
_SIZES = (16, 32, 64)


def why_not(arguments: SsdArguments) -> str | None:
    """The reason why the package cannot run these arguments, or None."""
    reason = packages.why_not(arguments, "flash-linear-attention", "fla", _SIZES)
    if reason is None and needs_gradient(arguments) and gated_gradients_miscompiled(arguments.x.device):
        return "Triton 3.4 to 3.7.0 compiles its backward pass wrongly for Hopper GPUs"
    return reason


def run(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    """y and the final state; both carry gradients, the state an empty tensor where it is not wanted."""
    x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, cu_seqlens, _, wants_state, chunk_size = arguments
    heads = x.shape[2]
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = F.softplus(dt) if dt_softplus else dt
    # (batch, length, heads, d_state)
    k, q = (M.to(x.dtype).repeat_interleave(heads // M.shape[2], dim=2) for M in (B, C))
    y, final_state = importlib.import_module(_MODULE).chunk_simple_gla(
        q=q,
        k=k,
        v=(x * dt[..., None]).to(x.dtype),  # (batch, length, heads, head_dim)
        g=dt * A.float(),
        scale=1.0,
        initial_state=None if initial_state is None else _transposed(initial_state),
        output_final_state=wants_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
        chunk_size=chunk_size,
    )
    if D is not None:
        y = y + D.float()[:, None] * x
    return y.to(x.dtype), _transposed(final_state) if wants_state else x.new_zeros(0, dtype=torch.float32)


def _transposed(state: Tensor) -> Tensor:
    """Ours is `(..., head_dim, d_state)`, the package's has d_state first."""
    return state.float().transpose(-1, -2).contiguous()  # the last two axes change places
