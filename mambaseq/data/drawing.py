"""Random numbers that depend only on (seed, item, position), on any device. The items of a batch are drawn together,
and each equals what would be drawn alone."""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_M1, _M2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shifted(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # int64 has no logical shift


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _M1
    x = (x ^ _shifted(x, 27)) * _M2
    return x ^ _shifted(x, 31)


def splitmix64(state: Tensor, n: int) -> Tensor:
    """The first n outputs of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) from each state: `(items,)` int64 →
    `(items, n)` int64, the bits of the unsigned numbers. Products of int64 wrap, on the CPU as on a GPU."""
    steps = torch.arange(1, n + 1, device=state.device)
    return _mix(state[:, None] + steps * _GAMMA)


def words(seed: int, items: Tensor, n: int) -> Tensor:
    """n random 32-bit numbers for each item, `(items, n)` int64 in [0, 2**32): a function of seed and item alone."""
    stream = _mix(_mix(torch.full_like(items, seed)) + items * _GAMMA)
    return _shifted(splitmix64(stream, n), 32)


def below(words: Tensor, bound: int | Tensor) -> Tensor:
    """32-bit random numbers → integers in [0, bound), bound < 2**31, a number or one for each. A value's probability is
    exact to 2**-32."""
    return (words * bound) >> 32


def distinct(words: Tensor, bound: int) -> Tensor:
    """`(items, k)` 32-bit random numbers → k different integers in [0, bound), ascending; every set of k is equally
    likely (Floyd's sampling, CACM 30(9), 1987)."""
    k = words.shape[1]
    number = torch.arange(k, device=words.device)
    last = bound - k + number
    new = below(words, last + 1)
    # a number that is taken gives way to `last`: one that was drawn before, or for which an earlier one gave way
    earlier = number[:, None] > number
    gives_way = ((new[:, :, None] == new[:, None]) & earlier).any(2)
    before = new - (bound - k)  # whose `last` it is
    before = torch.where((before >= 0) & (before < number), before, number)
    for _ in range(k.bit_length()):
        gives_way = gives_way | gives_way.gather(1, before)
        before = before.gather(1, before)
    return torch.where(gives_way, last, new).sort(1).values
