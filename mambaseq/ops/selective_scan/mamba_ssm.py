"""The selective scan of the `mamba-ssm` package (Gu & Dao's CUDA kernels), where it can do what is asked.

The package is imported when it runs for the first time, or is asked for float16, which some builds of it lack.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from mambaseq.ops.selective_scan.arguments import ScanArguments

_INSTALLED = importlib.util.find_spec("mamba_ssm") is not None
_MODULE = "mamba_ssm.ops.selective_scan_interface"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_STATES = 256


def why_not(arguments: ScanArguments) -> str | None:
    """The reason why the package cannot run these arguments, or None."""
    if arguments.x.device.type != "cuda":
        return f"its kernels run on CUDA, x is on {arguments.x.device}"
    if not _INSTALLED:
        return "mamba-ssm is not installed"
    if torch.compiler.is_compiling():
        return "it is not registered with torch.library"
    if arguments.x.dtype not in _DTYPES:
        return f"x is {arguments.x.dtype}"
    if arguments.A.is_complex():
        return "A is complex"
    if arguments.A.shape[1] > _MAX_STATES:
        return f"d_state is {arguments.A.shape[1]}, above {_MAX_STATES}"
    if arguments.x.shape[1] == 0:
        return "the length is 0"
    if arguments.B.ndim == arguments.C.ndim == 4 and arguments.B.shape[2] != arguments.C.shape[2]:
        return "B and C have different groups"
    if arguments.initial_state is not None:
        return "it takes no initial state"
    if arguments.cu_seqlens is not None:
        return "it takes no packed sequences"
    if arguments.reverse:
        return "it does not run in reverse"
    if arguments.wants_final_state and torch.is_grad_enabled() and _needs_gradient(arguments):
        return "its final state carries no gradient"
    if arguments.x.dtype is torch.float16 and not _has_float16():
        return "this build of mamba-ssm has no float16"
    return None


@functools.cache
def _has_float16() -> bool:
    one = torch.ones(1, 1, 1, device="cuda", dtype=torch.float16)
    try:
        importlib.import_module(_MODULE).selective_scan_fn(one, one, -torch.ones(1, 1, device="cuda"), one, one)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return False
    return True


def run(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """y and the final state; only y carries gradients."""
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, *_ = arguments
    scan = importlib.import_module(_MODULE).selective_scan_fn

    def time_last(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(x.dtype).movedim(1, -1)  # (batch, ..., length)

    def matrix(M: Tensor) -> Tensor | None:
        return M.float() if M.ndim == 2 else time_last(M)

    y, final_state = scan(
        time_last(x),
        time_last(dt),
        A.float(),
        matrix(B),
        matrix(C),
        D=None if D is None else D.float(),
        z=time_last(z),
        delta_bias=None if dt_bias is None else dt_bias.float(),
        delta_softplus=dt_softplus,
        return_last_state=True,
    )
    return y.transpose(1, 2).to(x.dtype), final_state.float()  # (batch, length, channels)


def _needs_gradient(arguments: ScanArguments) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in arguments)
