"""Causal multi-head self-attention: the mixer of the Transformer++ baseline, with `mlp` as its other half.

Vaswani et al., arXiv:1706.03762; rotary positions (Su et al., arXiv:2104.09864); keys and values shared by groups of
heads (Ainslie et al., arXiv:2305.13245).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive, check_sizes
from mambaseq.mixers.base import Mixer, check_state
from mambaseq.mixers.growing import GrowingState, Places, gathered, longest_new, written
from mambaseq.mixers.norm import RMSNorm
from mambaseq.ops import sequences
from mambaseq.ops.chunks import padded
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear import apply_linear

# the widest heads that flash attention takes, and the oldest GPUs
_FLASH_HEAD, _FLASH_CAPABILITY = 256, (8, 0)
_WIDEST_DEFAULT_HEAD = 64


@dataclasses.dataclass
class KVCache(GrowingState):
    """k (turned to their positions), v `(sequences, capacity, n_kv_heads, head_dim)`, in the dtype they are made in."""

    rows: ClassVar[tuple[str, ...]] = ("k", "v")

    k: Tensor
    v: Tensor


def turns(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(..., 1, head_dim / 2)` of position theta^(-2i / head_dim), positions `(...)` int64."""
    # in float64: at position a million, angles in float32 would be off by 0.03
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float64) / head_dim)
    angle = position[..., None, None] * frequency  # (..., 1, head_dim / 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x `(..., heads, head_dim)`: features i and i + n of the first 2 n as a complex
    number, turned by the angle of i (arXiv:2104.09864, eq. 34, which pairs neighbours; LLaMA's code pairs halves).

    cos, sin: `(..., 1, n)`. Features from 2 n on stay as they are.
    """
    width = 2 * cos.shape[-1]
    a, b = x[..., :width].to(cos.dtype).chunk(2, dim=-1)
    still = [x[..., width:].to(cos.dtype)] if width < x.shape[-1] else []
    return torch.cat([a * cos - b * sin, a * sin + b * cos, *still], dim=-1).to(x.dtype)  # (..., heads, head_dim)


class Attention(Mixer):
    """softmax(q k^T / sqrt(head_dim)) v over the past, by PyTorch's scaled_dot_product_attention.

    The state keeps keys and values of all positions. Memory of a call: without a history, that of the flash kernels,
    linear in the length. From a history, a mask of `batch x length x (history + length)` booleans. Packed sequences in
    half precision on CUDA go to the kernel for sequences of different lengths as they are; elsewhere they are padded to
    the longest, whose length is read on the host.

    Args:
        d_model: width of the residual stream.
        n_heads: number of heads; None for d_model / head_dim, or with both None as many as make head_dim the largest
            even divisor of d_model up to 64.
        n_kv_heads: heads of keys and values, each shared by n_heads / n_kv_heads heads in a row; None for n_heads.
        head_dim: width of a head; None for d_model / n_heads.
        rope: rotary position embedding of queries and keys. Without it the order of the past is not visible.
        rope_dims: features of a head that are turned, the first ones (half of them in Bamba and GPT-NeoX); None for
            all. Even.
        rope_theta: base of its wavelengths, the longest of which is near 2 pi rope_theta positions.
        qk_norm: an RMSNorm of each query and key before they are turned (arXiv:2302.05442, section 2).
        window: positions that a position sees, including itself; None for all of the past. The state keeps all of them.
        bias: biases of the projections.
    """

    bounded_state = False
    companion = "mlp"

    def __init__(
        self,
        d_model: int,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        window: int | None = None,
        bias: bool = False,
        rope_dims: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes("attention", d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim)
        check_sizes("attention", window=window, rope_dims=rope_dims)
        check_positive("attention", rope_theta=rope_theta)
        self.d_model = d_model
        self.n_heads, self.head_dim = _heads(d_model, n_heads, head_dim)
        self.n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"attention: n_heads must be a multiple of n_kv_heads, but {self.n_heads} is not a multiple of "
                f"{self.n_kv_heads}; take a divisor of {self.n_heads}."
            )
        if rope_dims is not None and (not rope or rope_dims > self.head_dim or rope_dims % 2):
            raise ConfigError(
                f"attention: rope_dims {rope_dims} must be even, at most head_dim {self.head_dim}, and go with rope."
            )
        if rope and rope_dims is None and self.head_dim % 2:
            raise ConfigError(
                f"attention: rope rotates pairs of features, but head_dim {self.head_dim} is odd; set n_heads or "
                "head_dim so that head_dim is even, or rope: false."
            )
        self.rope, self.rope_theta, self.window = rope, rope_theta, window
        self.rope_dims = self.head_dim if rope_dims is None else rope_dims
        self.in_proj = nn.Linear(d_model, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, bias=bias)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=bias)
        for module in (self.in_proj, self.out_proj):
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, x: Tensor, state: KVCache | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        places = Places.of(x, state, cu_seqlens)
        q, k, v = self._project(x, places.position)
        new: KVCache | None = None
        if return_state or (state is not None and state.longest):
            new = _extended(state, k, v, places, longest_new(x, cu_seqlens))
        if state is not None and state.longest:
            assert new is not None
            y = self._look_back(q, new, state, places, cu_seqlens)
        else:
            y = self._from_nothing(q, k, v, places, cu_seqlens)
        y = apply_linear(self.out_proj, y.flatten(-2))  # from (batch, length, n_heads * head_dim)
        return (y, new) if return_state else y

    def _check(self, state: KVCache, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        n = sequences.count(x, cu_seqlens)
        check_state("attention", state, KVCache, x.device, length=(n,))
        shape = (n, state.capacity, self.n_kv_heads, self.head_dim)
        check_state("attention", state, KVCache, x.device, k=shape, v=shape)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `(..., n_heads, head_dim)`, k, v `(..., n_kv_heads, head_dim)` of x `(..., d_model)`."""
        # (..., n_heads + 2 n_kv_heads, head_dim)
        qkv = apply_linear(self.in_proj, x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            cos, sin = turns(position, self.rope_dims, self.rope_theta, working_dtype(q))
            q, k = turned(q, cos, sin), turned(k, cos, sin)
        return q, k, v

    def _from_nothing(self, q: Tensor, k: Tensor, v: Tensor, places: Places, cu_seqlens: Tensor | None) -> Tensor:
        """Attention of `(batch, length, heads, head_dim)` without a history."""
        k, v = self._repeated(k), self._repeated(v)
        batch, length = q.shape[:2]
        windowed = self.window is not None and self.window < length
        if (cu_seqlens is not None or windowed) and _can_run_flash(q):
            from torch.nn.attention.varlen import varlen_attn  # which imports the compiler

            if cu_seqlens is None:
                cu_seqlens = length * torch.arange(batch + 1, device=q.device, dtype=torch.int32)
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (batch * length, heads, head_dim)
            bounds, window = cu_seqlens.int(), (-1 if self.window is None else self.window - 1, 0)
            y = varlen_attn(q, k, v, bounds, bounds, length, length, window_size=window)
            assert isinstance(y, Tensor)
            return y.unflatten(0, (batch, length))  # (batch, length, heads, head_dim)
        if cu_seqlens is None:
            return self._local(q, k, v) if windowed else _attention(q, k, v)
        longest = longest_new(q, cu_seqlens)
        q, k, v = (written(None, t, places, places.offset, longest) for t in (q, k, v))
        windowed = self.window is not None and self.window < longest
        return gathered(self._local(q, k, v) if windowed else _attention(q, k, v), places, places.offset)

    def _local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Blocks as long as the window, each of which sees itself and the previous one. Blocks take the place of the
        batch, and the batch joins the heads, so that one mask `(blocks, 1, window, 2 window)` is enough."""
        assert self.window is not None
        window, (batch, length, heads, _) = self.window, q.shape
        n = -(-length // window)
        q, k, v = (t.transpose(0, 1).flatten(1, 2) for t in (q, k, v))  # (length, batch * heads, head_dim)
        q = padded(q, 0, n * window).unflatten(0, (n, window))  # (n, window, batch * heads, head_dim)
        k, v = (F.pad(t, (0, 0, 0, 0, window, n * window - length)).unflatten(0, (n + 1, window)) for t in (k, v))
        k, v = (torch.cat([t[:-1], t[1:]], dim=1) for t in (k, v))  # (n, 2 window, batch * heads, head_dim)
        at = torch.arange(2 * window, device=q.device)
        age = at[window:, None] - at  # of each key, seen from each query
        real = (at >= window) | (torch.arange(n, device=q.device)[:, None, None, None] > 0)  # (n, 1, 1, 2 window)
        y = _attention(q, k, v, (age >= 0) & (age < window) & real)
        # (batch, length, heads, head_dim)
        return y.unflatten(2, (batch, heads)).permute(2, 0, 1, 3, 4).flatten(1, 2)[:, :length]

    def _look_back(self, q: Tensor, cache: KVCache, old: KVCache, places: Places, cu_seqlens: Tensor | None) -> Tensor:
        """Attention of new positions over a cache that already contains them."""
        n = longest_new(q, cu_seqlens)
        if cu_seqlens is not None:
            q = written(None, q, places, places.offset, n)
        k, v = (t[:, : cache.longest].to(q.dtype) for t in (cache.k, cache.v))
        position = old.length[:, None] + torch.arange(n, device=q.device)  # (sequences, n)
        seen = self._seen(position, k.shape[1])
        y = _attention(q, self._repeated(k), self._repeated(v), seen[:, None])  # the mask: (sequences, 1, n, keys)
        return y if cu_seqlens is None else gathered(y, places, places.offset)

    def _seen(self, position: Tensor, n: int) -> Tensor:
        """Which of n keys a query at `position` sees: `(..., n)` bool."""
        age = position[..., None] - torch.arange(n, device=position.device)
        return age >= 0 if self.window is None else (age >= 0) & (age < self.window)

    def _repeated(self, x: Tensor) -> Tensor:
        """Keys or values of every head: not all of SDPA's kernels can share them."""
        group = self.n_heads // self.n_kv_heads
        return x if group == 1 else x.repeat_interleave(group, dim=-2)  # (..., n_heads, head_dim)

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """See `Mixer.init_state`; with room for max_length positions; none at first if it is None."""
        weight = self.in_proj.weight
        device = weight.device if device is None else device
        shape = (batch_size, max_length or 0, self.n_kv_heads, self.head_dim)
        k, v = (torch.zeros(shape, dtype=dtype or weight.dtype, device=device) for _ in range(2))
        return KVCache(torch.zeros(batch_size, dtype=torch.int64, device=device), 0, k, v)

    @torch.no_grad()
    def step_(self, x: Tensor, state: KVCache) -> Tensor:
        """See `Mixer.step_`. If there is room, nothing is allocated for the state, and nothing waits for a GPU."""
        self._check(state, x)
        state.make_room_()
        q, k, v = self._project(x, state.length[:, None])  # (batch, 1, heads, head_dim)
        at = (torch.arange(x.shape[0], device=x.device), state.length)
        state.k.index_put_(at, k[:, 0].to(state.k.dtype))
        state.v.index_put_(at, v[:, 0].to(state.v.dtype))
        state.longest += 1
        # a step captured in a CUDA graph must read what later steps will need
        n = state.capacity if x.is_cuda else state.longest
        keys, values = state.k[:, :n].to(q.dtype), state.v[:, :n].to(q.dtype)
        # heads that share keys are queries of one head
        q = q.unflatten(2, (self.n_kv_heads, -1)).squeeze(1).transpose(1, 2)  # (batch, group, n_kv_heads, head_dim)
        y = _attention(q, keys, values, self._seen(state.length, n)[:, None, None])  # the mask: (batch, 1, 1, n)
        state.length.add_(1)
        return apply_linear(self.out_proj, y.transpose(1, 2).flatten(1)).unsqueeze(1)  # (batch, 1, d_model)


def _heads(d_model: int, n_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """n_heads and head_dim, with defaults for None."""
    if n_heads is None and head_dim is None:
        even = [n for n in range(2, _WIDEST_DEFAULT_HEAD + 1, 2) if d_model % n == 0]
        head_dim = even[-1] if even else d_model
    if head_dim is None:
        assert n_heads is not None
        if d_model % n_heads:
            raise ConfigError(
                f"attention: d_model {d_model} is not divisible by n_heads {n_heads}; take a divisor, or set head_dim."
            )
        return n_heads, d_model // n_heads
    if n_heads is None:
        if d_model % head_dim:
            raise ConfigError(
                f"attention: d_model {d_model} is not divisible by head_dim {head_dim}; take a divisor, or set n_heads."
            )
        n_heads = d_model // head_dim
    return n_heads, head_dim


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """q, k, v and the result `(batch, length, heads, head_dim)`; causal if no mask is given."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, heads, length, head_dim)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None).transpose(1, 2)


def _can_run_flash(q: Tensor) -> bool:
    """Whether the kernel for sequences of different lengths can run."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.numel() == 0:
        return False
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= _FLASH_HEAD
    return fits and torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= _FLASH_CAPABILITY


def _extended(old: KVCache | None, k: Tensor, v: Tensor, places: Places, new: int) -> KVCache:
    """A cache with these positions added, at most `new` to each sequence."""
    longest = new if old is None else old.longest + new
    return KVCache(
        places.new if old is None else old.length + places.new,
        longest,
        written(None if old is None else old.k, k, places, places.position, longest),
        written(None if old is None else old.v, v, places, places.position, longest),
    )
