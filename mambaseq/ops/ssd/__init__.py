"""The state-space dual (SSD) of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): one scalar decay a head and step."""

from __future__ import annotations

from torch import Tensor

from mambaseq.ops import dispatch
from mambaseq.ops.ssd import arguments as _arguments
from mambaseq.ops.ssd import chunked, fla, gpu, mamba_ssm, reference
from mambaseq.ops.ssd.arguments import SsdArguments

OP = dispatch.Op(
    name="ssd",
    backends=(
        dispatch.Backend("triton", gpu.run, gpu.why_not),
        dispatch.Backend("torch", chunked.run, dispatch.never),
        # behind one that always runs: by name only
        dispatch.Backend("mamba_ssm", mamba_ssm.run, mamba_ssm.why_not),
        dispatch.Backend("fla", fla.run, fla.why_not),
        dispatch.Backend("reference", reference.run, dispatch.never),
    ),
    samples=_arguments.samples,
    half=_arguments.half,
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of a state-space model whose heads each decay by one number a step.

        dt' = softplus(dt + dt_bias)       (dt as it is when dt_softplus is False and dt_bias is None)
        h_t = exp(dt'_t A) h_{t-1} + dt'_t x_t ⊗ B_t
        y_t = h_t C_t + D x_t

    With A = 0 and dt = 1 it is causal linear attention with values x, keys B and queries C.

    Args:
        x: `(batch, length, heads, head_dim)`, float64, float32, bfloat16 or float16. Float64 is computed in
            float64, all others in float32, under autocast too; but the kernels of GPUs, which take half precision
            alone, round what they multiply to it and keep sums and states in float32.
        dt: step sizes `(batch, length, heads)`.
        A: `(heads,)`; the decay, as a rule negative.
        B: `(batch, length, groups, d_state)`; each group serves `heads / groups` neighbouring heads.
        C: the same.
        D: `(heads,)`, the skip connection.
        dt_bias: `(heads,)`, added to dt before the softplus.
        initial_state: `(batch, heads, head_dim, d_state)`, or `(sequences, ...)` with `cu_seqlens`; zeros if None.
        return_final_state: make the state after the last position of each sequence. Without it some
            backends return an empty tensor instead, which is faster.
        cu_seqlens: `(sequences + 1,)` int32, with batch 1: sequence s lies at
            `cu_seqlens[s]:cu_seqlens[s + 1]`; no state crosses a boundary. Sequences may be empty.
        reverse: time runs from the last position of each sequence to its first: the initial state enters at
            the last position and the final state leaves at the first.
        chunk_size: positions that are computed as one matrix; a matter of speed and memory only. Any length will do.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        y, the shape and dtype of x, and the final state in float32 (float64 if x is float64). Both
        carry gradients to every floating-point argument.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend asked for cannot run these arguments.
    """
    arguments = SsdArguments(
        x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, cu_seqlens, reverse, return_final_state, chunk_size
    )
    _arguments.check(arguments)
    return dispatch.run(OP, arguments, backend)
