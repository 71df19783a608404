"""The short depthwise causal convolution in front of the selective scan."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mambaseq.ops import dispatch
from mambaseq.ops.causal_conv import arguments as _arguments
from mambaseq.ops.causal_conv import cpu, gpu, reference
from mambaseq.ops.causal_conv.arguments import ConvArguments

Activation = Literal["silu"]

OP = dispatch.Op(
    name="causal_conv",
    backends=(
        dispatch.Backend("cpu", cpu.run, cpu.why_not),
        dispatch.Backend("triton", gpu.run, gpu.why_not),
        dispatch.Backend("reference", reference.run, dispatch.never),
    ),
    samples=_arguments.samples,
)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own short filter that sees the present and the past only.

        y_t = activation(bias + sum_k weight[:, k] x_{t - (width - 1) + k})

    Args:
        x: `(batch, length, channels)`, float64, float32, bfloat16 or float16; summed in float32 (float64 if x
            is).
        weight: `(channels, width)`; the last column meets the present input.
        bias: `(channels,)`.
        activation: "silu" or None.
        initial_state: `(batch, channels, width - 1)`, or `(sequences, channels, width - 1)` with
            `cu_seqlens`: the inputs before the first, oldest first; zeros if None.
        return_final_state: make the last `width - 1` inputs of each sequence, oldest first. Without it some
            backends return an empty tensor instead, which is faster.
        cu_seqlens: `(sequences + 1,)` int32, with batch 1: sequence s lies at
            `cu_seqlens[s]:cu_seqlens[s + 1]`. Sequences may be empty.
        reverse: time runs from the last position of each sequence to its first; "oldest" is then the latest.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        y, the shape and dtype of x, and the final state in float32 (float64 if x is float64).
        Both carry gradients to x, weight, bias and initial_state.

    Raises:
        ValueError: shapes or devices do not fit, or the backend asked for cannot run these arguments.
    """
    arguments = ConvArguments(x, weight, bias, activation, initial_state, cu_seqlens, reverse, return_final_state)
    _arguments.check(arguments)
    return dispatch.run(OP, arguments, backend)
