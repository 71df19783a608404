"""The Transformer for comparison: RMSNorm, RoPE, SDPA, SwiGLU (LLaMA, arXiv:2302.13971), tied weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN's attention makes a plan for each new length, which a growing cache would wait for
DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Layer(nn.Module):
    """Attention and a gated feed-forward layer, each after a norm and added to its input."""

    def __init__(self, d_model: int, n_heads: int, d_hidden: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.RMSNorm(d_model, eps=1e-5), nn.RMSNorm(d_model, eps=1e-5)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], cache: Tensor | None = None, start: int = 0) -> Tensor:
        """x `(batch, length, d_model)`; turns: cosines and sines of these positions `(length, 1, head)`.

        cache: `(2, batch, positions, heads, head)`, keys and values; those of x are written from `start` on, and x
            attends to them and to earlier ones. With a cache, x is one position, or the first ones (start 0).
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        q, k = _turned(q, turns), _turned(k, turns)
        if cache is not None:
            end = start + x.shape[1]
            cache[0, :, start:end], cache[1, :, start:end] = k, v
            k, v = cache[0, :, :end], cache[1, :, :end]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


class Transformer(nn.Module):
    """A causal language model.

    Args:
        max_length: positions of its rotary embedding.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, d_hidden: int, max_length: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Layer(d_model, n_heads, d_hidden) for _ in range(n_layers))
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
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
        shape = (2, batch, positions, self.n_heads, self.head)
        return [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in self.layers]

    @torch.no_grad()
    def extend_(self, ids: Tensor, cache: list[Tensor], start: int) -> Tensor:
        """Logits `(batch, vocab_size)` after the last of ids `(batch, length)`, whose positions begin at `start`."""
        with sdpa_kernel(DECODING):
            return F.linear(self._hidden(ids, cache, start)[:, -1], self.embedding.weight)

    def _hidden(self, ids: Tensor, cache: list[Tensor] | None = None, start: int = 0) -> Tensor:
        x = self.embedding(ids)
        turns = tuple(t[start : start + ids.shape[1]].to(_working(x)) for t in (self.cos, self.sin))
        for index, layer in enumerate(self.layers):
            x = layer(x, turns, None if cache is None else cache[index], start)
        return self.norm(x)


def _working(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turns
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
