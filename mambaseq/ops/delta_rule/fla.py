"""The delta rule by flash-linear-attention (Yang et al., Triton kernels), where it can do what is asked.

Taken only when asked for by name: its products round to the half precision of v, where ours compute in float32. The
package is imported when it runs for the first time, never before.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.delta_rule.arguments import DeltaArguments
from mambaseq.ops.gpu import packages

_DTYPES = (torch.bfloat16, torch.float16)
_MOST = 256  # channels of a key
# of a log-decay: float32 has 0 below it too, and the kernels subtract sums, which of -inf are no numbers
_FORGOTTEN = -128.0
# by whether there is a decay a channel, and whether the rule corrects: module and function
_KERNELS = {
    (False, True): ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    (True, True): ("fla.ops.kda", "chunk_kda"),
    (False, False): ("fla.ops.simple_gla", "chunk_simple_gla"),
    (True, False): ("fla.ops.gla", "chunk_gla"),
}


def why_not(arguments: DeltaArguments) -> str | None:
    """The reason why the package cannot run these arguments, or None."""
    v, k = arguments.v, arguments.k
    if v.device.type != "cuda":
        return f"its kernels run on CUDA, v is on {v.device}"
    if not packages.installed("fla"):
        return "flash-linear-attention is not installed"
    if torch.compiler.is_compiling():
        return "it is not registered with torch.library"
    if v.dtype not in _DTYPES:
        return f"v is {v.dtype}, its products round float32 to TF32"
    if 0 in v.shape or 0 in k.shape:
        return "k or v is empty"
    if k.shape[3] > _MOST:
        return f"keys have {k.shape[3]} channels; it takes {_MOST}"
    if arguments.reverse:
        return "it does not run in reverse"
    if packages.needs_gradient(arguments) and packages.gated_gradients_miscompiled(v.device):
        return "Triton 3.4 to 3.7.0 compiles its backward pass wrongly for Hopper GPUs"
    return None


def run(arguments: DeltaArguments) -> tuple[Tensor, Tensor]:
    """y and the final state; both carry gradients, the state an empty tensor where it is not wanted."""
    q, k, v, g, beta, initial_state, cu_seqlens, _, wants_state, _ = arguments
    q, k = (value.to(v.dtype).repeat_interleave(v.shape[2] // value.shape[2], dim=2) for value in (q, k))
    g = v.new_zeros(v.shape[:3], dtype=torch.float32) if g is None else g.float().clamp(min=_FORGOTTEN)
    module, name = _KERNELS[g.ndim == 4, beta is not None]
    rule: dict[str, Any] = {} if beta is None else {"beta": beta.float()}
    y, final_state = getattr(importlib.import_module(module), name)(
        q=q,
        k=k,
        v=v,
        g=g,
        **rule,
        scale=1.0,
        initial_state=None if initial_state is None else _transposed(initial_state),
        output_final_state=wants_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )
    return y.to(v.dtype), _transposed(final_state) if wants_state else v.new_zeros(0, dtype=torch.float32)


def _transposed(state: Tensor) -> Tensor:
    """Ours is `(..., d_value, d_key)`, the package's has d_key first."""
    return state.float().transpose(-1, -2).contiguous()  # the last two axes change places
