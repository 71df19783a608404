"""What the blocks share: registering, the reasons why one cannot run, the convolution, linear maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.causal_conv import gpu as conv
from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.eager import wants_reference
from mambaseq.ops.gpu import portable
from mambaseq.ops.operators import Operator, register
from mambaseq.ops.selective_scan.cuda import why_not_on
from mambaseq.ops.selective_scan.launches import CODES


class Block(NamedTuple):
    """What makes a block an operator: see `Operator`. Its outputs are `(output, conv_state, ssm_state)`.

    differentiable: how many arguments get gradients, the first. kept: how many tensors forward keeps for backward.
    matrices(a): the weights in the dtype that is computed in, given to forward and backward after the arguments.
    """

    name: str
    arguments: Any
    schema: str
    differentiable: int
    kept: int
    matrices: Callable[[Any], Any]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor | None, ...]]
    fake: Callable[..., tuple[Tensor, ...]]
    why_not: Callable[[Any], str | None]


def block_operator(block: Block) -> Callable[[Any], tuple[Tensor, Tensor, Tensor]]:
    """Register the operator; returns what runs its arguments.

    That gives the output `(batch, length, d_model)` in the dtype of x and, if wanted, the states of the convolution and
    of the scan after the last position; all carry gradients. Matrices are used in the dtype of x, all else in float32.

    Raises (when it runs):
        ValueError: the block cannot run as one (see its `why_not`), or cu_seqlens does not fit.
    """
    name, why_not = block.name, block.why_not
    run = register(
        Operator(
            block.name,
            block.arguments,
            block.schema,
            block.arguments._fields[: block.differentiable],
            block.forward,
            block.backward,
            block.fake,
            outputs=3,
            kept=block.kept,
            device_types="cuda",
            prepare=block.matrices,
        )
    )

    def checked(arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        if (reason := why_not(arguments)) is not None:
            raise ValueError(f"{name}: cannot run these arguments: {reason}")
        if arguments.cu_seqlens is not None:
            sequences.check(arguments.cu_seqlens, *arguments.x.shape[:2])
        out, conv_state, ssm_state = run(arguments)
        return out, conv_state, ssm_state

    return checked


def why_not_cuda(x: Tensor) -> str | None:
    """The reason why the scans' CUDA kernels cannot run on x, or None."""
    if not x.is_cuda:
        return f"the kernels run on CUDA, x is on {x.device}"
    if (reason := portable.why_not("cuda") or why_not_on(x.device)) is not None:
        return reason
    return None if x.dtype in CODES else f"x is {x.dtype}"


def why_not_sizes(arguments: Any) -> str | None:
    """The reason why no block can run these arguments: the shape of x, the filter's width, float64; or that the
    reference alone is wanted; or None."""
    if wants_reference():
        return "the reference alone is wanted"
    x = arguments.x
    if x.numel() == 0 or x.shape[1] >= conv.LONGEST:
        return f"x is {tuple(x.shape)}"
    if arguments.conv.shape[-1] > conv.WIDEST:
        return f"the filter is wider than {conv.WIDEST}"
    for name, value in arguments._asdict().items():
        if isinstance(value, Tensor) and value.dtype in (torch.float64, torch.complex128):
            return f"{name} is {value.dtype}, the kernels compute in float32"
    return None


def convolution(a: Any, x: Tensor) -> ConvArguments:
    """A block's convolution of x `(batch, length, channels)`."""
    weight = a.conv.view(a.conv.shape[0], -1)  # (channels, d_conv)
    return ConvArguments(x, weight, a.conv_bias, "silu", a.conv_state, a.cu_seqlens, False, a.wants_state)


def vector(value: Tensor) -> Tensor:
    """In float32, contiguous."""
    return value if value.dtype == torch.float32 and value.is_contiguous() else value.float().contiguous()


def vectors(*values: Tensor) -> list[Tensor]:
    """The same of several. On a GPU by one kernel, whose time is that of being started."""
    if all(value.dtype == torch.float32 for value in values):
        return [vector(value) for value in values]
    wide = [torch.empty(value.shape, dtype=torch.float32, device=value.device) for value in values]
    torch._foreach_copy_(wide, [value.detach() for value in values])
    return wide


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x `(rows, in)` to `(rows, out)`, weight and x of one dtype."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def weight_gradient(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """left^T right in the weight's dtype."""
    if weight.dtype == torch.float32 and left.dtype != torch.float32 and left.is_cuda and torch.version.hip is None:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return (left.t() @ right).to(weight.dtype)
