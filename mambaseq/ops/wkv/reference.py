"""The definition of the WKV: a loop over time, on any device, differentiable by autograd."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.wkv.arguments import WkvArguments


def run(arguments: WkvArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of k, and the final state. Computed in float64 if k is float64, otherwise in float32."""
    real = working_dtype(arguments.k)
    k, v, w, u = (value.to(real) for value in arguments[:4])
    state = arguments.state()
    if arguments.cu_seqlens is None:
        y, final = _loop(k, v, w, u, state)
    else:
        ys, finals = [k[:, :0]], [state[:0]]
        for s, (start, end) in enumerate(itertools.pairwise(sequences.offsets(arguments.cu_seqlens, k.shape[1]))):
            one, last = _loop(k[:, start:end], v[:, start:end], w, u, state[s : s + 1])
            ys.append(one)
            finals.append(last)
        y, final = torch.cat(ys, dim=1), torch.cat(finals)
    return y.to(arguments.k.dtype), final


def _loop(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    num, den, exponent = state[:, 0], state[:, 1], state[:, 2].detach()
    ys: list[Tensor] = []
    for t in range(k.shape[1]):
        k_t, v_t = k[:, t], v[:, t]
        # Results do not depend on what is subtracted from exponents, so nothing is differentiated through it.
        top = torch.maximum(exponent, u + k_t).detach()
        before, now = torch.exp(exponent - top), torch.exp(u + k_t - top)
        ys.append((before * num + now * v_t) / (before * den + now))
        top = torch.maximum(exponent - w, k_t).detach()
        before, now = torch.exp(exponent - w - top), torch.exp(k_t - top)
        num, den, exponent = before * num + now * v_t, before * den + now, top
    return (torch.stack(ys, dim=1) if ys else k), torch.stack([num, den, exponent], dim=1)  # (b, t, c), (b, 3, c)
