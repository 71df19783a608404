"""The time-invariant scan as the selective scan with a step size of 1, in chunks of plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaseq.ops.lti.arguments import LtiArguments
from mambaseq.ops.selective_scan import chunked
from mambaseq.ops.selective_scan.arguments import ScanArguments


def why_not(arguments: LtiArguments) -> str | None:
    """The reason why a scan is not wanted, or None."""
    return "mode is 'fft'" if arguments.mode == "fft" else None


def run(arguments: LtiArguments) -> tuple[Tensor, Tensor]:
    """y in the working precision, float64 if x is float64 and otherwise float32, and the final state."""
    x, log_decay, B, C, initial_state, cu_seqlens, reverse = arguments[:7]
    x = x.to(arguments.real_dtype)
    return chunked.run(
        ScanArguments(
            x,
            torch.ones_like(x),
            log_decay,
            B,
            C,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
        )
    )
