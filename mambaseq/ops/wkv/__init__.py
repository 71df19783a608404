"""The WKV of RWKV-4 (Peng et al. 2023, arXiv:2305.13048, section 3.1.2): an average weighted by exponentials."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaseq.ops import dispatch
from mambaseq.ops.shapes import check_step
from mambaseq.ops.wkv import arguments as _arguments
from mambaseq.ops.wkv import reference, scan
from mambaseq.ops.wkv.arguments import WkvArguments, empty_state

__all__ = ["OP", "WkvArguments", "empty_state", "wkv", "wkv_update_"]

OP = dispatch.Op(
    name="wkv",
    backends=(
        dispatch.Backend("torch", scan.run, dispatch.never),
        dispatch.Backend("reference", reference.run, dispatch.never),
    ),
    samples=_arguments.samples,
)


def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Average the values of the past and the present, each channel its own.

        y_t = (sum_{i<t} exp(-(t-1-i) w + k_i) v_i + exp(u + k_t) v_t)
              / (sum_{i<t} exp(-(t-1-i) w + k_i)     + exp(u + k_t))

    Args:
        k: `(batch, length, channels)`, float64, float32, bfloat16 or float16; any size is safe. Float64 is computed in
            float64, all others in float32.
        v: what is averaged, as k.
        w: `(channels,)`, not negative: how fast the past is forgotten.
        u: `(channels,)`, the bonus of the present.
        initial_state: `(batch, 3, channels)`, or `(sequences, 3, channels)` with `cu_seqlens`: numerator and
            denominator, both to be multiplied by exp of the third, which is the largest exponent in them. None for an
            empty history (`empty_state`).
        return_final_state: make the state after the last position of each sequence. Without it some
            backends return an empty tensor instead, which is faster.
        cu_seqlens: `(sequences + 1,)` int32, with batch 1: sequence s lies at `cu_seqlens[s]:cu_seqlens[s + 1]`.
            Sequences may be empty.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        y, the shape and dtype of k, and the final state in float32 (float64 if k is float64). Both carry
        gradients to k, v, w, u and the numerator and denominator of the initial state. The exponents are constants:
        what they are makes no difference to later outputs.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or there is no such backend.
    """
    arguments = WkvArguments(k, v, w, u, initial_state, cu_seqlens)
    _arguments.check(arguments)
    return dispatch.run(OP, arguments, backend)


def wkv_update_(state: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """One step of `wkv`; changes state `(batch, 3, channels)` in place.

    k, v `(batch, channels)`; w, u `(channels,)`. Returns y `(batch, channels)` in the dtype of k. Raises ValueError
    where shapes do not fit.
    """
    one = (state.shape[0], state.shape[2])
    check_step("wkv_update_", ("k", k, one), ("v", v, one), ("w", w, one[1:]), ("u", u, one[1:]))
    dtype, (num, den, m) = k.dtype, state.unbind(1)
    k, v, w, u = (value.to(state.dtype) for value in (k, v, w, u))
    top = torch.maximum(m, u + k)
    past, present = torch.exp(m - top), torch.exp((k - top) + u)
    y = (past * num + present * v) / (past * den + present)
    top = torch.maximum(m - w, k)
    keep, enter = torch.exp((m - top) - w), torch.exp(k - top)
    state.copy_(torch.stack([keep * num + enter * v, keep * den + enter, top], dim=1))  # (batch, 3, channels)
    return y.to(dtype)
