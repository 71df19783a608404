"""The state-space dual of the `mamba-ssm` package (Dao & Gu's Triton kernels), where it can do what is asked.

Taken only when asked for by name: Triton 3.4 to 3.7.0 miscompiles some backward kernels of this kind on Hopper GPUs.
Where dt is negative, which without the softplus it may be, the package takes it for 0.
The package is imported when it runs for the first time, never before.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.ssd import packages
from mambaseq.ops.ssd.arguments import SsdArguments

_MODULE = "mamba_ssm.ops.triton.ssd_combined"
_SIZES = (16, 32, 64, 128, 256)


def why_not(arguments: SsdArguments) -> str | None:
    """The reason why the package cannot run these arguments, or None."""
    reason = packages.why_not(arguments, "mamba-ssm", "mamba_ssm", _SIZES)
    packed = arguments.cu_seqlens is not None
    if reason is None and packed and (arguments.initial_state is not None or arguments.wants_final_state):
        return "it takes no states of packed sequences"
    return reason


def run(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    """y and the final state; both carry gradients, the state an empty tensor where it is not wanted."""
    x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, cu_seqlens, _, wants_state, chunk_size = arguments
    scan = importlib.import_module(_MODULE).mamba_chunk_scan_combined
    result = scan(
        x,
        dt,
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        chunk_size,
        D=None if D is None else D.float(),
        dt_bias=None if dt_bias is None else dt_bias.float(),
        initial_states=None if initial_state is None else initial_state.float(),
        # (1, length)
        seq_idx=None if cu_seqlens is None else sequences.of_positions(cu_seqlens, x.shape[1]).int()[None],
        dt_softplus=dt_softplus,
        return_final_states=wants_state,
    )
    y, final_state = result if wants_state else (result, x.new_zeros(0, dtype=torch.float32))
    return y.to(x.dtype), final_state.float()
