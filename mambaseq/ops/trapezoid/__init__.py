"""The recurrence of Mamba-3 (arXiv:2603.15569): exponential-trapezoidal steps, one input a head or several."""

from __future__ import annotations

from torch import Tensor

from mambaseq.ops import dispatch
from mambaseq.ops.trapezoid import arguments as _arguments
from mambaseq.ops.trapezoid import chunked, gpu, reference
from mambaseq.ops.trapezoid.arguments import TrapezoidArguments
from mambaseq.ops.trapezoid.step import trapezoidal_update_

__all__ = ["OP", "TrapezoidArguments", "trapezoidal_scan", "trapezoidal_update_"]

OP = dispatch.Op(
    name="trapezoidal_scan",
    backends=(
        dispatch.Backend("triton", gpu.run, gpu.why_not),
        dispatch.Backend("torch", chunked.run, dispatch.never),
        dispatch.Backend("reference", reference.run, dispatch.never),
    ),
    samples=_arguments.samples,
    half=_arguments.half,
)


def trapezoidal_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    initial_x: Tensor | None = None,
    initial_B: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a state-space model whose steps weigh the input at their end and at their beginning.

        w_t = Σ_r x_{t,r} ⊗ B_{t,r}
        h_t = exp(dt_t A_t) (h_{t-1} + (1 - trap_t) dt_t w_{t-1}) + trap_t dt_t w_t
        y_{t,r} = h_t C_{t,r}

    trap = 1 is the state-space dual of Mamba-2, with an A of each position's own.

    Args:
        x: `(batch, length, heads, rank, head_dim)`, float64, float32, bfloat16 or float16; rank inputs a head share a
            state. Float64 is computed in float64, all others in float32, under autocast too.
        dt: step sizes, not negative, `(batch, length, heads)`.
        A: rates, as a rule negative, `(batch, length, heads)`.
        trap: the share of a step's input that is taken at its end, `(batch, length, heads)`; of the trapezoidal rule
            1/2.
        B: `(batch, length, heads, rank, d_state)`.
        C: the same.
        initial_state: `(batch, heads, head_dim, d_state)`, or `(sequences, ...)` with `cu_seqlens`; zeros if None.
        initial_x: x of the position before the first, `(batch, heads, rank, head_dim)`, or `(sequences, ...)`; with
            initial_B. None if there is none.
        initial_B: B there, `(batch, heads, rank, d_state)`, or `(sequences, ...)`.
        return_final_state: make the state after the last position of each sequence. Without it some
            backends return an empty tensor instead, which is faster.
        cu_seqlens: `(sequences + 1,)` int32, with batch 1: sequence s lies at
            `cu_seqlens[s]:cu_seqlens[s + 1]`; no state crosses a boundary. Sequences may be empty.
        reverse: time runs from the last position of each sequence to its first: the initial state enters at
            the last position and the final state leaves at the first.
        chunk_size: positions that are computed as one matrix, at most; a matter of speed and memory only. Any length
            will do.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        y, the shape and dtype of x, and the final state in float32 (float64 if x is float64). Both carry gradients to
        every floating-point argument. To go on from there, x and B of the last position are needed, too.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or there is no such backend.
    """
    arguments = TrapezoidArguments(
        x, dt, A, trap, B, C, initial_state, initial_x, initial_B, cu_seqlens, reverse, return_final_state, chunk_size
    )
    _arguments.check(arguments)
    return dispatch.run(OP, arguments, backend)
