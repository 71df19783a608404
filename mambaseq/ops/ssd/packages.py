"""What the backends by other packages share. Their kernels compute the state-space dual in half precision."""

from __future__ import annotations

import torch

from mambaseq.ops.dispatch import PACKAGES
from mambaseq.ops.gpu.packages import installed
from mambaseq.ops.ssd.arguments import SsdArguments

_DTYPES = (torch.bfloat16, torch.float16)


def input_dtype(backend: str | None, activations: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a mixer with unbounded sums calls `ssd`: full precision, or, for activations in half
    precision, what the named kernels take, or the fastest on this device.

    Sums over a long past leave the range of float16, so it is bfloat16 in its place.
    """
    by_kernels = backend in (*PACKAGES, "triton") or (backend is None and device.type == "cuda")
    if by_kernels and activations in _DTYPES:
        return torch.bfloat16
    return torch.promote_types(activations, torch.float32)


def why_not(arguments: SsdArguments, package: str, module: str, chunk_sizes: tuple[int, ...]) -> str | None:
    """The reason why none of them could run these arguments, or None."""
    x = arguments.x
    if x.device.type != "cuda":
        return f"its kernels run on CUDA, x is on {x.device}"
    if not installed(module):
        return f"{package} is not installed"
    if torch.compiler.is_compiling():
        return "it is not registered with torch.library"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, its products round float32 to TF32"
    if arguments.chunk_size not in chunk_sizes:
        return f"chunk_size is {arguments.chunk_size}, not one of {', '.join(map(str, chunk_sizes))}"
    if 0 in x.shape or 0 in arguments.B.shape:
        return "x or B is empty"
    if arguments.reverse:
        return "it does not run in reverse"
    return None
