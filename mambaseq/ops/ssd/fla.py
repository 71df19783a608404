"""The state-space dual by flash-linear-attention's `chunk_simple_gla` (Yang et al., Triton kernels), where it can do
what is asked: states and packed sequences with gradients among it.

Taken only when asked for by name: its products round to the half precision of x, where others compute in float32.
The package is imported when it runs for the first time, never before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.ssd.arguments import SsdArguments

_INSTALLED = importlib.util.find_spec("fla") is not None
_MODULE = "fla.ops.simple_gla"
_DTYPES = (torch.bfloat16, torch.float16)
_SIZES = (16, 32, 64)
_HOPPER = 9  # major compute capability


def why_not(arguments: SsdArguments) -> str | None:
    """The reason why the package cannot run these arguments, or None."""
    x = arguments.x
    if x.device.type != "cuda":
        return f"its kernels run on CUDA, x is on {x.device}"
    if not _INSTALLED:
        return "flash-linear-attention is not installed"
    if torch.compiler.is_compiling():
        return "it is not registered with torch.library"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, its products round float32 to TF32"
    if arguments.chunk_size not in _SIZES:
        return f"chunk_size is {arguments.chunk_size}, not one of {', '.join(map(str, _SIZES))}"
    if 0 in x.shape or 0 in arguments.B.shape:
        return "x or B is empty"
    if arguments.reverse:
        return "it does not run in reverse"
    if _miscompiled(x.device) and torch.is_grad_enabled() and _needs_gradient(arguments):
        return "Triton 3.4 to 3.7.0 compiles its backward pass wrongly for Hopper GPUs"
    return None


def run(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    """y and the final state; both carry gradients, the state an empty tensor where it is not wanted."""
    x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, cu_seqlens, _, wants_state, chunk_size = arguments
    heads = x.shape[2]
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = F.softplus(dt) if dt_softplus else dt
    k, q = (M.to(x.dtype).repeat_interleave(heads // M.shape[2], dim=2) for M in (B, C))
    y, final_state = importlib.import_module(_MODULE).chunk_simple_gla(
        q=q,
        k=k,
        v=(x * dt[..., None]).to(x.dtype),
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
    return state.float().transpose(-1, -2).contiguous()


@functools.cache
def _miscompiled(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return False
    release = importlib.metadata.version("triton").partition("+")[0].split(".")[:3]
    return (3, 4) <= tuple(map(int, release)) < (3, 7, 1)


def _needs_gradient(arguments: SsdArguments) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in arguments)
