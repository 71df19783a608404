"""Dense linear systems that do not change with time: S4, LSSL, the Legendre memory; of one state each, S5."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaseq.ops import dispatch, sequences
from mambaseq.ops.state_space import arguments as _arguments
from mambaseq.ops.state_space import blocks, reference
from mambaseq.ops.state_space.arguments import StateSpaceArguments

OP = dispatch.Op(
    name="state_space_scan",
    backends=(
        dispatch.Backend("blocks", blocks.run, dispatch.never),
        dispatch.Backend("reference", reference.run, dispatch.never),
    ),
    samples=_arguments.samples,
)


def state_space_scan(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a linear system of a full matrix, already discretised, on each channel its own.

        h_t = A h_{t-1} + B x_t
        y_t = C h_t

    Args:
        x: `(batch, length, channels)`. Float64 is computed in float64, all others in float32; complex if A is.
        A: `(systems, d_state, d_state)`, real or complex, each for as many neighbouring channels:
            `channels % systems == 0`. Its powers are made in float64: give it in float64 where it was made so.
        B: `(systems, d_state)`.
        C: `(systems, outputs, d_state)`; None gives the states themselves.
        initial_state: `(batch, channels, d_state)`, or `(sequences, channels, d_state)` with `cu_seqlens`;
            zeros if None.
        return_final_state: make the state after the last position of each sequence. Without it some
            backends return an empty tensor instead, which is faster.
        cu_seqlens: `(sequences + 1,)` int32, with batch 1: sequence s lies at
            `cu_seqlens[s]:cu_seqlens[s + 1]`; no state crosses a boundary. Sequences may be empty.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        y `(batch, length, channels, outputs)`, in the dtype of x, or in that of the states where A is complex, and
        the final state in float32 or complex64 (float64 and complex128 if x is in double precision).
        Both carry gradients to every floating-point argument.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(x, A, B, C, initial_state, cu_seqlens)
    if C is None:
        C = torch.eye(A.shape[1], dtype=A.dtype, device=A.device).expand_as(A)
    y, final_state = dispatch.run(
        OP, StateSpaceArguments(x, A, B, C, initial_state, cu_seqlens, return_final_state), backend
    )
    y = y if y.is_complex() else y.to(x.dtype)
    return y, final_state


def _check(x: Tensor, A: Tensor, B: Tensor, C: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, length, channels), not {tuple(x.shape)}")
    batch, length, channels = x.shape
    if A.ndim != 3 or A.shape[1] != A.shape[2] or channels % A.shape[0]:
        raise ValueError(
            f"A must be (systems, d_state, d_state) with systems a divisor of the {channels} channels, "
            f"not {tuple(A.shape)}"
        )
    systems, d_state = A.shape[:2]
    if B.shape != (systems, d_state):
        raise ValueError(f"B must be {(systems, d_state)}, not {tuple(B.shape)}")
    if C is not None and (C.ndim != 3 or C.shape[::2] != (systems, d_state)):
        raise ValueError(f"C must be ({systems}, outputs, {d_state}), not {tuple(C.shape)}")
    n_sequences = batch
    if cu_seqlens is not None:
        sequences.check(cu_seqlens, batch, length)
        n_sequences = cu_seqlens.shape[0] - 1
    if state is not None and state.shape != (n_sequences, channels, d_state):
        raise ValueError(f"initial_state must be {(n_sequences, channels, d_state)}, not {tuple(state.shape)}")
    given = {"x": x, "A": A, "B": B, "C": C, "initial_state": state}
    for name, value in given.items():
        if value is None:
            continue
        if not (value.is_floating_point() or value.is_complex()):
            raise ValueError(f"{name} must be floating-point or complex numbers, not {value.dtype}")
        if value.is_complex() and not A.is_complex():
            raise ValueError(f"{name} is complex but A is real")
    for name, value in {**given, "cu_seqlens": cu_seqlens}.items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}")
