"""From logits to a token."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaseq.errors import ConfigError


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Scale by 1/temperature and set to -inf what is outside of the top k and of the nucleus of mass top_p.

    logits `(batch, vocab_size)` fp32. top_k 0 and top_p 1 keep everything. The nucleus is the smallest set of the
    likeliest tokens whose mass reaches top_p (Holtzman et al., arXiv:1904.09751); it is never empty.
    Raises ConfigError for values out of range.
    """
    if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"temperature must be positive, top_k at least 0 and top_p in (0, 1], not {temperature}, {top_k}, {top_p}."
        )
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        drop = mass - ordered.softmax(-1) >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a row: `(batch,)` int64. temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
