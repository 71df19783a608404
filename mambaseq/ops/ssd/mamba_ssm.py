"""The state-space dual of the `mamba-ssm` package (Dao & Gu's Triton kernels), where it can do what is asked.

Taken only when asked for by name: Triton 3.4 to 3.7.0 miscompiles some backward kernels of this kind on Hopper GPUs.
Where dt is negative, which without the softplus it may be, the package takes it for 0.
The package is imported when it runs for the first time, never before.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.ssd.arguments import SsdArguments

_INSTALLED = importlib.util.find_spec("mamba_ssm") is not None
_MODULE = "mamba_ssm.ops.triton.ssd_combined"
_DTYPES = (torch.bfloat16, torch.float16)
_SIZES = (16, 32, 64, 128, 256)


def why_not(arguments: SsdArguments) -> str | None:
    """The reason why the package cannot run these arguments, or None."""
    x = arguments.x
    if x.device.type != "cuda":
        return f"its kernels run on CUDA, x is on {x.device}"
    if not _INSTALLED:
        return "mamba-ssm is not installed"
    if torch.compiler.is_compiling():
        return "it is not registered with torch.library"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, its products round float32 to TF32"
    if arguments.chunk_size not in _SIZES:
        return f"chunk_size is {arguments.chunk_size}, not one of {', '.join(map(str, _SIZES))}"
    if 0 in x.shape:
        return "x is empty"
    if arguments.cu_seqlens is not None and (arguments.initial_state is not None or arguments.wants_final_state):
        return "it takes no states of packed sequences"
    if arguments.reverse:
        return "it does not run in reverse"
    return None


def run(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    """y and the final state; both carry gradients, the state an empty tensor where it is not wanted."""
    x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, cu_seqlens, _, wants_state, chunk_size = arguments
    scan = importlib.import_module(_MODULE).mamba_chunk_scan_combined
    result = scan(
        x.contiguous(),
        dt.contiguous(),
        A.float(),
        B.to(x.dtype).contiguous(),
        C.to(x.dtype).contiguous(),
        chunk_size,
        D=None if D is None else D.float(),
        dt_bias=None if dt_bias is None else dt_bias.float(),
        initial_states=None if initial_state is None else initial_state.float(),
        seq_idx=None if cu_seqlens is None else sequences.of_positions(cu_seqlens, x.shape[1]).int()[None],
        dt_softplus=dt_softplus,
        return_final_states=wants_state,
    )
    y, final_state = result if wants_state else (result, x.new_zeros(0, dtype=torch.float32))
    return y.to(x.dtype), final_state.float()
