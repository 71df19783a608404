"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464), with a decay a head or a channel (Kimi team 2025,
arXiv:2510.26692), or without the rule, as gated linear attention (Yang et al. 2023, arXiv:2312.06635)."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaseq.ops import dispatch
from mambaseq.ops.delta_rule import arguments as _arguments
from mambaseq.ops.delta_rule import chunked, fla, gpu, reference, step
from mambaseq.ops.delta_rule.arguments import DeltaArguments
from mambaseq.ops.shapes import check_divide, check_step

__all__ = ["OP", "DeltaArguments", "delta_rule", "delta_rule_update_"]

OP = dispatch.Op(
    name="delta_rule",
    backends=(
        dispatch.Backend("triton", gpu.run, gpu.why_not),
        dispatch.Backend("torch", chunked.run, dispatch.never),
        # behind one that always runs: by name only
        dispatch.Backend("fla", fla.run, fla.why_not),
        dispatch.Backend("reference", reference.run, dispatch.never),
    ),
    samples=_arguments.samples,
    half=_arguments.half,
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep a matrix that maps keys to values, and correct at every step what it says of the step's key.

        S' = S_{t-1} diag(exp(g_t))
        S_t = S' + beta_t (v_t - S' k_t) k_tᵀ      (without beta: S' + v_t k_tᵀ, gated linear attention)
        y_t = S_t q_t

    Of keys of length 1, beta = 1 replaces the value and 0 leaves it; up to 2 the step's eigenvalue, 1 - beta, is
    negative, which tracking states needs.

    Args:
        q: `(batch, length, key heads, d_key)`, float64, float32, bfloat16 or float16.
        k: the same. Each head of keys serves `heads / key heads` neighbouring heads.
        v: `(batch, length, heads, d_value)`. Float64 is computed in float64, all others in float32, under autocast too;
            but the kernels of GPUs round what they multiply to the dtype of v, and keep sums and states in float32.
        g: log-decays, as a rule negative, -inf to forget all: `(batch, length, heads)`, or `(batch, length, heads,
            d_key)` for one a channel of the keys. None for no decay.
        beta: `(batch, length, heads)`. None for no correction.
        initial_state: `(batch, heads, d_value, d_key)`, or `(sequences, ...)` with `cu_seqlens`; zeros if None.
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
        y, the shape and dtype of v, and the final state in float32 (float64 if v is float64). Both carry gradients to
        every floating-point argument.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend asked for cannot run these arguments.
    """
    arguments = DeltaArguments(q, k, v, g, beta, initial_state, cu_seqlens, reverse, return_final_state, chunk_size)
    _arguments.check(arguments)
    return dispatch.run(OP, arguments, backend)


def delta_rule_update_(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    """One step of `delta_rule`; changes state `(batch, heads, d_value, d_key)`, float32 or bfloat16, in place.

    Without gradients it is one kernel on a GPU, and on a CPU with a float32 state.

    q, k `(batch, key heads, d_key)`, v `(batch, heads, d_value)`, g `(batch, heads)` or `(batch, heads, d_key)`, beta
    `(batch, heads)`. Returns y, the shape and dtype of v. Raises ValueError where shapes do not fit.
    """
    batch, heads, d_value, d_key = state.shape
    of_key, of_step = (batch, k.shape[1], d_key), (batch, heads)
    check_step("delta_rule_update_", ("v", v, (batch, heads, d_value)), ("k", k, of_key), ("q", q, of_key))
    of_g = of_step if g is None or g.ndim == 2 else (*of_step, d_key)
    check_step("delta_rule_update_", ("g", g, of_g), ("beta", beta, of_step))
    check_divide("delta_rule_update_", "k", k.shape[1], heads)
    if step.can_run_on_cpu(state, q, k, v, g, beta):
        return step.update_on_cpu_(state, q, k, v, g, beta)
    if step.can_run_on_gpu(state, q, k, v, g, beta):
        return step.update_on_gpu_(state, q, k, v, g, beta)
    if state.dtype == torch.bfloat16:  # computed in float32, rounded when it is written
        kept = state.float()
        y = delta_rule_update_(kept, q, k, v, g, beta)
        state.copy_(kept)
        return y
    wide = state.dtype
    q, k = (value.to(wide).repeat_interleave(heads // value.shape[1], dim=1) for value in (q, k))
    if g is not None:
        state.mul_(torch.exp(g.to(wide))[..., None, None] if g.ndim == 2 else torch.exp(g.to(wide))[:, :, None])
    u = v.to(wide)
    if beta is not None:
        u = beta.to(wide)[..., None] * (u - (state @ k[..., None]).squeeze(-1))
    state.add_(u[..., None] * k[:, :, None])
    return (state @ q[..., None]).squeeze(-1).to(v.dtype)
