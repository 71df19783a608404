"""The Transformer for comparison: RMSNorm, RoPE, keys and values shared by groups of heads (arXiv:2305.13245), SDPA,
SwiGLU (LLaMA, arXiv:2302.13971), tied weights.

On a GPU a decoding step of one sequence takes the kernels that ours takes (`ops/decoding/layer.py`): norms are part of
the linear maps behind them, sums and gates of those before them, and keys, values and turned queries are written by one
kernel. Six or seven kernels a layer, of which two are attention's.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mambaseq.ops.decoding import layer as steps
from mambaseq.ops.gpu import portable

# cuDNN's attention makes a plan for each new length, which a growing cache would wait for
DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
EPS = 1e-5


class Layer(nn.Module):
    """Attention and a gated feed-forward layer, each after a norm and added to its input."""

    def __init__(self, d_model: int, n_heads: int, d_hidden: int, n_kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head = n_heads, n_kv_heads, d_model // n_heads
        self.norm1, self.norm2 = nn.RMSNorm(d_model, eps=EPS), nn.RMSNorm(d_model, eps=EPS)
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.head, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], cache: Tensor | None = None, start: int = 0) -> Tensor:
        """x `(batch, length, d_model)`; turns: cosines and sines of these positions `(length, 1, head)`.

        cache: `(2, batch, positions, kv_heads, head)`, keys and values; those of x are written from `start` on, and x
            attends to them and to earlier ones. With a cache, x is one position, or the first ones (start 0).
        """
        shared = self.n_kv_heads
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head)).split([self.n_heads, shared, shared], dim=2)
        q, k = _turned(q, turns), _turned(k, turns)
        if cache is not None:
            end = start + x.shape[1]
            cache[0, :, start:end], cache[1, :, start:end] = k, v
        if x.shape[1] == 1 and cache is not None:
            y = self.attend(q[:, 0], cache, start + 1)[:, None]
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared != self.n_heads)
            y = y.transpose(1, 2).flatten(2)
        x = x + self.out(y)
        gate, value = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)

    def attend(self, q: Tensor, cache: Tensor, n: int) -> Tensor:
        """q `(batch, heads, head)` over the first n positions, to `(batch, d_model)`. Heads that share keys are queries
        of one head, so that keys and values are read once."""
        k, v = (t[:, :n].transpose(1, 2) for t in cache)  # (batch, kv_heads, n, head)
        q = q.unflatten(1, (self.n_kv_heads, -1))  # (batch, kv_heads, group, head)
        return F.scaled_dot_product_attention(q, k, v).flatten(1)

    def step(self, residual: Tensor, turns: tuple[Tensor, Tensor], cache: Tensor, position: int) -> Tensor:
        """The stream behind one position, `(batch, d_model)` fp32, by the kernels of whole layers."""
        dtype = self.qkv.weight.dtype
        norm1, norm2 = (steps.LayerNorm(norm.weight, EPS) for norm in (self.norm1, self.norm2))
        qkv = steps.linear_step(residual, self.qkv.weight, norm=norm1, out_dtype=dtype)
        q = qkv.new_empty(len(qkv), self.n_heads, self.head)
        with portable.on(qkv):
            _kernels().turn_and_keep[(len(qkv), self.n_heads + 2 * self.n_kv_heads)](
                qkv,
                *turns,
                q,
                cache,
                position,
                cache.stride(0),
                cache.stride(1),
                HEADS=self.n_heads,
                SHARED=self.n_kv_heads,
                HALF=self.head // 2,
                PADDED=1 << (self.head // 2 - 1).bit_length(),
                num_warps=1,
            )
        y = self.attend(q, cache, position + 1)
        residual = steps.linear_step(y, self.out.weight, residual=residual, out_dtype=torch.float32)
        both = steps.linear_step(residual, self.up.weight, norm=norm2, out_dtype=dtype)
        gate, value = both.chunk(2, dim=-1)
        return steps.linear_step(value, self.down.weight, gate=gate, residual=residual, out_dtype=torch.float32)


class Transformer(nn.Module):
    """A causal language model.

    Args:
        max_length: positions of its rotary embedding.
        n_kv_heads: heads of keys and values, each shared by as many heads; None for one each.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_hidden: int,
        max_length: int,
        n_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.n_kv_heads, self.d_hidden = n_heads if n_kv_heads is None else n_kv_heads, d_hidden
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Layer(d_model, n_heads, d_hidden, self.n_kv_heads) for _ in range(n_layers))
        self.norm = nn.RMSNorm(d_model, eps=EPS)
        self.n_heads, self.head = n_heads, d_model // n_heads
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 * (2 * n_layers) ** (-0.5 if ("out" in name or "down" in name) else 0))
        frequencies = 10000.0 ** (-torch.arange(0, self.head, 2) / self.head)
        angles = torch.outer(torch.arange(max_length), frequencies).repeat(1, 2)[:, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """ids `(batch, length)` to logits `(batch, length, vocab_size)`, or to the mean loss in nats."""
        logits = F.linear(self._hidden(ids), self.embedding.weight)
        return logits if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def init_cache(self, batch: int, positions: int) -> list[Tensor]:
        """Memory for keys and values, one tensor for each layer."""
        weight = self.embedding.weight
        shape = (2, batch, positions, self.n_kv_heads, self.head)
        return [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in self.layers]

    @torch.no_grad()
    def extend_(self, ids: Tensor, cache: list[Tensor], start: int) -> Tensor:
        """Logits `(batch, vocab_size)` after the last of ids `(batch, length)`, whose positions begin at `start`."""
        with sdpa_kernel(DECODING):
            if ids.shape[1] == 1 and self.steps_by_kernels(len(ids)):
                hidden = self.step(ids[:, 0], cache, start)
            else:
                hidden = self._hidden(ids, cache, start)[:, -1]
            return F.linear(hidden, self.embedding.weight)

    def steps_by_kernels(self, rows: int) -> bool:
        """Whether a step of so many sequences is taken by the kernels of whole layers."""
        weight = self.embedding.weight
        widest = max(self.d_hidden, self.embedding.embedding_dim)
        if not weight.is_cuda or portable.why_not("cuda") is not None:
            return False
        return rows == 1 and weight.dtype != torch.float64 and widest <= steps.WIDEST and steps.tuning.on

    def step(self, ids: Tensor, cache: list[Tensor], position: int) -> Tensor:
        """What is hidden behind ids `(batch,)` at a position, `(batch, d_model)`, by the kernels of whole layers."""
        residual = self.embedding(ids).float()
        turns = self.cos[position, 0], self.sin[position, 0]
        for index, layer in enumerate(self.layers):
            residual = layer.step(residual, turns, cache[index], position)  # type: ignore[operator]
        weight = self.norm.weight
        return F.rms_norm(residual, weight.shape, weight.float(), EPS).to(weight.dtype)

    def _hidden(self, ids: Tensor, cache: list[Tensor] | None = None, start: int = 0) -> Tensor:
        x = self.embedding(ids)
        turns = tuple(t[start : start + ids.shape[1]].to(_working(x)) for t in (self.cos, self.sin))
        for index, layer in enumerate(self.layers):
            x = layer(x, turns, None if cache is None else cache[index], start)
        return self.norm(x)


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("mambaseq.benchmarking.transformer_kernels")


def _working(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turns
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
