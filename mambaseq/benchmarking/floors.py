"""How fast a device could be at best: what it reads from memory and multiplies a second, by its maker's word for known
cards, measured for others."""

from __future__ import annotations

import dataclasses
import functools
import time

import torch

from mambaseq.cards import card


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes of memory a second, and operations of bf16 matrix products without sparsity. source: whose word it is."""

    bytes_per_s: float
    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e9:,.0f} GB/s and {self.flops / 1e12:,.1f} TFLOP/s ({self.source})"


@functools.cache
def peak(device: torch.device) -> Peak:
    """Of a device: its maker's figures, or else the best of some copies and products."""
    if device.type == "cuda" and (known := card(torch.cuda.get_device_name(device))) is not None:
        return Peak(known.bytes_per_s, known.flops, f"the maker's for {known.name}")
    return Peak(_copied(device), _multiplied(device), "measured by a copy and a product")


def _copied(device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: to.copy_(source), device)


def _multiplied(device: torch.device) -> float:
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    return 2 * n**3 / _best(lambda: left @ right, device)


def _best(run, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    """Seconds of a call."""
    found = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
