"""The selective scan of Mamba (Gu & Dao 2023, arXiv:2312.00752, algorithm 2); S4D's with constant B and C."""

from __future__ import annotations

from torch import Tensor

from mambaseq.ops import dispatch
from mambaseq.ops.selective_scan import arguments as _arguments
from mambaseq.ops.selective_scan import chunked, cpu, cuda, mamba_ssm, reference
from mambaseq.ops.selective_scan.arguments import ScanArguments

OP = dispatch.Op(
    name="selective_scan",
    backends=(
        dispatch.Backend("cpu", cpu.run, cpu.why_not),
        dispatch.Backend("cuda", cuda.run, cuda.why_not),
        dispatch.Backend("mamba_ssm", mamba_ssm.run, mamba_ssm.why_not),
        dispatch.Backend("torch", chunked.run, dispatch.never),
        dispatch.Backend("reference", reference.run, dispatch.never),
    ),
    samples=_arguments.samples,
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of a diagonal state-space model whose step size and matrices depend on the input.

        dt' = softplus(dt + dt_bias)       (dt as it is when dt_softplus is False and dt_bias is None)
        h_t = exp(dt'_t A) h_{t-1} + dt'_t x_t B_t
        y_t = (h_t · C_t + D x_t) silu(z_t)

    With complex A one half of each conjugate pair is kept: `h_t · C_t` becomes `2 Re(h_t · C_t)`.

    Args:
        x: `(batch, length, channels)`, float64, float32, bfloat16 or float16. Float64 is computed in float64,
            all others accumulate in float32.
        dt: step sizes, the shape of x.
        A: `(channels, d_state)`, real or complex; the decay of each state.
        B: `(batch, length, d_state)`; or `(batch, length, groups, d_state)`, each group serving
            `channels / groups` neighbouring channels; or `(channels, d_state)`, constant in time. It may be
            complex if A is.
        C: the same.
        D: `(channels,)`, the skip connection.
        z: the gate, the shape of x.
        dt_bias: `(channels,)`, added to dt before the softplus.
        initial_state: `(batch, channels, d_state)`, or `(sequences, channels, d_state)` with `cu_seqlens`;
            zeros if None.
        return_final_state: make the state after the last position of each sequence. Without it some
            backends return an empty tensor instead, which is faster.
        cu_seqlens: `(sequences + 1,)` int32, with batch 1: sequence s lies at
            `cu_seqlens[s]:cu_seqlens[s + 1]`; no state crosses a boundary. Sequences may be empty.
        reverse: time runs from the last position of each sequence to its first: the initial state enters at
            the last position and the final state leaves at the first.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        y, the shape and dtype of x, and the final state in float32 (complex64 if A is complex;
        float64 and complex128 if x is float64). Both carry gradients to every floating-point argument.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend asked for cannot run these arguments.
    """
    arguments = ScanArguments(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, reverse, return_final_state
    )
    _arguments.check(arguments)
    return dispatch.run(OP, arguments, backend)
