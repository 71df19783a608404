"""What makers say of their GPUs: Lightning's list counts the H200's products with sparsity, and misses its name."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Card(NamedTuple):
    """name: the part of PyTorch's name that tells it. Bytes of memory a second; operations a second, without sparsity,
    of matrix products in bf16 or fp16, and in fp32 without TF32."""

    name: str
    bytes_per_s: float
    flops: float
    fp32_flops: float

    def flops_in(self, dtype: torch.dtype, tf32: bool) -> float:
        """Operations a second of products in a dtype. tf32: whether those in fp32 may be made in TF32, at half of
        bf16's speed on all of these."""
        if dtype != torch.float32:
            return self.flops
        return self.flops / 2 if tf32 else self.fp32_flops


CARDS = (
    Card("GH200", 4.0e12, 989e12, 67e12),
    Card("H200 NVL", 4.8e12, 835e12, 60e12),
    Card("H200", 4.8e12, 989e12, 67e12),
    Card("H100 NVL", 3.9e12, 835e12, 60e12),
    Card("H100 PCIe", 2.0e12, 756e12, 51e12),
    Card("H100", 3.35e12, 989e12, 67e12),
    Card("A100-SXM4-80GB", 2.039e12, 312e12, 19.5e12),
    Card("A100-SXM4-40GB", 1.555e12, 312e12, 19.5e12),
)
"""The first whose name fits."""


def card(name: str) -> Card | None:
    """Of a GPU by the name that PyTorch gives it; None if unknown."""
    return next((it for it in CARDS if it.name in name), None)
