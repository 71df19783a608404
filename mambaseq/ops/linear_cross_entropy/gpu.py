"""The loss on a GPU: a chunk of logits at a time, by cuBLAS, becomes its own gradient in a Triton kernel (kernels.py).

The gradients of hidden and weight are taken in the forward pass already, since their direction does not depend on what
comes after a sum; the backward pass scales them. So the logits are computed once, and a chunk of them is all there is.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import portable
from mambaseq.ops.linear_cross_entropy.arguments import LossArguments

# bytes of a chunk's logits: large products, few additions to the gradient of the weight
CHUNK_BYTES = 1 << 29
# logits of a row start this many elements apart or a multiple: cuBLAS's and the kernel's wide loads need aligned rows,
# which a vocabulary of odd size does not give
_ALIGNED = 64
_FEWEST = 128  # rows that a chunk is a multiple of, where it can be
_BLOCK = 8192  # columns that a program holds
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(arguments: LossArguments) -> str | None:
    """The reason why the kernel cannot run these arguments, or None."""
    hidden, weight, _, _ = arguments
    if (reason := portable.why_not(hidden.device.type)) is not None:
        return reason
    for name, dtype in (("hidden", hidden.dtype), ("weight", weight.dtype), ("autocast", arguments.dtype)):
        if dtype not in _DTYPES:
            return f"{name} is {dtype}, the kernel computes in float32"
    if hidden.numel() == 0:
        return "hidden is empty"
    return None


def run(arguments: LossArguments) -> Any:
    """(loss,)."""
    hidden, weight, labels, ignore_index = arguments
    wanted = torch.is_grad_enabled()
    call = _Eager.apply if is_eager(*arguments) else _forward_op
    return (
        call(
            hidden,
            weight,
            labels,
            ignore_index,
            arguments.dtype,
            wanted and hidden.requires_grad,
            wanted and weight.requires_grad,
        )[0],
    )


@functools.cache
def _kernels() -> Any:
    """Imported when first needed: that imports Triton."""
    return importlib.import_module("mambaseq.ops.linear_cross_entropy.kernels")


def _chunk_rows(rows: int, bytes_a_row: int) -> int:
    """Rows of a chunk: even shares of all, within `CHUNK_BYTES`."""
    most = max(1, CHUNK_BYTES // bytes_a_row)
    if most > _FEWEST:
        most -= most % _FEWEST
    if rows <= most:
        return rows
    share = -(-rows // -(-rows // most))
    return min(most, -(-share // _FEWEST) * _FEWEST)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, not rounded to the dtype of a and b."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients in fp32, empty where they are not wanted."""
    device = hidden.device
    (rows, d_model), vocab = hidden.shape, weight.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=device)
    dhidden = torch.empty((rows, d_model) if wants_hidden else (0,), dtype=torch.float32, device=device)
    dweight: Tensor | None = None
    h, w = hidden.to(dtype), weight.to(dtype)
    labels = labels.contiguous()
    stride = -(-vocab // _ALIGNED) * _ALIGNED
    chunk = _chunk_rows(rows, stride * h.element_size())
    memory = torch.empty(chunk, stride, dtype=dtype, device=device)
    block = min(_BLOCK, 1 << (stride - 1).bit_length())
    kernel = _kernels().cross_entropy
    with portable.on(hidden), torch.autocast(device.type, enabled=False):
        for begin in range(0, rows, chunk):
            part = slice(begin, min(begin + chunk, rows))
            h_part = h[part]
            logits = memory[: len(h_part), :vocab]
            torch.mm(h_part, w.t(), out=logits)
            kernel[(len(h_part),)](
                logits, labels[part], losses[part], ignore_index,
                VOCAB=vocab, STRIDE=stride, BLOCK=block, STORE_GRADIENT=wants_hidden or wants_weight, num_warps=8,
            )  # fmt: skip
            if wants_hidden:
                dhidden[part] = _product(logits, w)
            if wants_weight:
                more = _product(logits.t(), h_part)
                dweight = more if dweight is None else dweight.add_(more)
                del more
    return losses.sum(), dhidden, hidden.new_empty(0, dtype=torch.float32) if dweight is None else dweight


_forward_op = torch.library.custom_op(
    "mambaseq::linear_cross_entropy",
    _forward,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, ScalarType dtype, bool wants_hidden, "
    "bool wants_weight) -> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(
    hidden: Any, weight: Any, labels: Any, ignore_index: int, dtype: Any, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if wants_hidden else (0,), dtype=torch.float32),
        weight.new_empty(weight.shape if wants_weight else (0,), dtype=torch.float32),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, _, _, ctx.wants_hidden, ctx.wants_weight = inputs
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    dhidden = dweight = None
    if dloss is not None:
        dhidden, dweight = ctx.saved_tensors
        dhidden = (dhidden * dloss).to(ctx.dtypes[0]) if ctx.wants_hidden else None
        dweight = (dweight * dloss).to(ctx.dtypes[1]) if ctx.wants_weight else None
    return dhidden, dweight, None, None, None, None, None


_forward_op.register_autograd(_gradients, setup_context=_remember)


class _Eager(torch.autograd.Function):
    """The same without the operator's wrappers."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
        outputs = _forward(*values)
        _remember(ctx, values, outputs)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return _gradients(ctx, dloss)
