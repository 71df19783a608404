"""What a stretch of time does to a state that is a sum of decayed products of values and keys: what it adds to the
state behind it, what it adds to the gradient of the state before it, and by how much it decays what comes in."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaseq.ops.dtypes import without_autocast, working_dtype

# positions whose weights are held at once
_STEPS = 4096


def state_behind(values: Tensor, keys: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The state after these positions, from zeros, `(batch, heads, d_value, d_key)`, and what they decay a state by,
    `(batch, heads, 1, d_key or 1)`. Without gradients.

    values `(batch, length, heads, d_value)`; keys `(batch, length, key heads, d_key)`, each head of which serves
    `heads / key heads` neighbouring heads; log_decay `(batch, length, heads)` or `(..., d_key)`, of the step before a
    value is added. The results have the working dtype of the values.
    """
    return _summed(values, keys, log_decay, back=False)


def gradient_before(dy: Tensor, queries: Tensor, log_decay: Tensor) -> Tensor:
    """The gradient of the state before these positions, as `state_behind`, that the one of their outputs, dy `(batch,
    length, heads, d_value)`, makes; an output is the state, with its own value added, times the query."""
    return _summed(dy, queries, log_decay, back=True)[0]


def decay(log_decay: Tensor) -> Tensor:
    """What positions decay a state by, see `state_behind`."""
    total = log_decay.detach().sum(1, dtype=torch.float64).to(working_dtype(log_decay))
    return torch.exp(total if total.ndim == 3 else total[..., None])[:, :, None]  # (batch, heads, 1, d_key or 1)


@torch.no_grad()
def _summed(values: Tensor, keys: Tensor, log_decay: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    batch, length, heads, d_value = values.shape
    key_heads, d_key = keys.shape[2:]
    wide = working_dtype(values)
    total = torch.zeros(batch, heads, d_value, d_key, dtype=wide, device=values.device)
    logs = log_decay.to(wide)
    logs = logs if logs.ndim == 4 else logs[..., None]  # (batch, length, heads, d_key or 1)
    between = logs.new_zeros(batch, 1, heads, logs.shape[-1])
    starts = range(0, length, _STEPS)
    with without_autocast(values.device.type):
        for start in starts if back else reversed(starts):
            here = slice(start, start + _STEPS)
            own = logs[:, here]
            if back:
                weights = torch.exp(between + own.cumsum(1))
            else:
                weights = torch.exp(between + own.flip(1).cumsum(1).flip(1) - own)
            v, k = values[:, here], keys[:, here].repeat_interleave(heads // key_heads, dim=2)
            if logs.shape[-1] == 1:
                v = v.to(wide) * weights
            else:
                k = k.to(wide) * weights
            total += _product(v, k, wide)
            between = between + own.sum(1, keepdim=True)
    return total, torch.exp(between[:, 0])[:, :, None]


def _product(v: Tensor, k: Tensor, wide: torch.dtype) -> Tensor:
    """Over time: `(batch, steps, heads, d_value)` and `(..., d_key)` to `(batch, heads, d_value, d_key)`."""
    left, right = v.permute(0, 2, 3, 1).flatten(0, 1), k.transpose(1, 2).flatten(0, 1)
    halves = [t.dtype for t in (v, k) if t.dtype in (torch.bfloat16, torch.float16)]
    if halves == [torch.bfloat16] and v.is_cuda and torch.version.hip is None:
        # what is weighted as the sum of two numbers of half precision, so that tensor cores lose nothing that matters
        parts = [(a, b) for a in _two(left, halves[0]) for b in _two(right, halves[0])]
        found = sum(torch.bmm(a, b, out_dtype=torch.float32) for a, b in parts)
    else:
        found = left.to(wide) @ right.to(wide)
    return found.unflatten(0, (v.shape[0], v.shape[2]))  # type: ignore[union-attr]


def _two(x: Tensor, half: torch.dtype) -> list[Tensor]:
    if x.dtype == half:
        return [x]
    first = x.to(half)
    return [first, (x - first).to(half)]
