"""The scan against attention and convolution as the sequence grows (the Mamba paper's figure 8, arXiv:2312.00752).

Batch 1, width 1024: a selective scan with 16 states, causal attention with heads of 64 (PyTorch's SDPA, which is flash
attention on a GPU), and a convolution as long as the sequence by FFT (fp32, its filter's transform included).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.benchmarking.cases import (
    Case,
    Contender,
    Pass,
    Plan,
    compare,
    our_backend,
    output_of,
    tolerance,
    training_dtype,
)
from mambaseq.benchmarking.long_scan import first_channels, long_scan
from mambaseq.benchmarking.report import OURS, Report, Row
from mambaseq.ops import selective_scan
from mambaseq.ops.selective_scan.arguments import ScanArguments

OP = "scan, attention, convolution"
ATTENTION, CONVOLUTION = "attention (SDPA)", "convolution (FFT)"
LENGTHS = {"full": [2**n for n in range(9, 20)], "small": [2**n for n in range(8, 12)], "tiny": [16, 64]}
WIDTH = {"full": 1024, "small": 128, "tiny": 8}
D_STATE = 16
HEAD = {"full": 64, "small": 64, "tiny": 4}
# positions of attention and convolution that are checked against float64
CHECKED = 64
# attention's time is quadratic in the length: no longer call is started
LONGEST_MS = 2000.0
PASSES: tuple[Pass, ...] = ("forward", "both")


def run(report: Report, repeats: int) -> None:
    """Add a row for each contender and length."""
    scale = report.scale
    report.head(f"scan, attention and convolution by length (batch 1, width {WIDTH[scale]})")
    attention_ms = 0.0
    for length in LENGTHS[scale]:
        for contender, make in ((OURS, scan), (ATTENTION, attention), (CONVOLUTION, convolution)):
            shape = {"batch": 1, "length": length}
            if make is attention and 4 * attention_ms > LONGEST_MS:
                note = f"a call would exceed {LONGEST_MS / 1e3:.0f} s"
                report.add(Row(OP, shape, ATTENTION, status="skipped", note=note))
                continue
            compare(Plan(OP, shape, functools.partial(make, length, scale, report.device), contender), report, repeats)
            if make is attention:
                attention_ms = report.rows[-1].values.get("both_ms", 0.0)


def scan(length: int, scale: str, device: torch.device) -> Case:
    """The selective scan with softplus and D, without a gate."""
    width, normal = WIDTH[scale], _normal(device)
    inputs: dict[str, Any] = {
        "x": normal(1, length, width),
        "dt": normal(1, length, width),
        "A": -torch.arange(1, D_STATE + 1, device=device).float().repeat(width, 1),
        "B": normal(1, length, D_STATE),
        "C": normal(1, length, D_STATE),
        "D": torch.ones(width, device=device),
        "dt_bias": torch.linspace(-6, -2, width, device=device),
    }
    arguments = ScanArguments(**inputs, dt_softplus=True, wants_final_state=False)
    backend = our_backend("selective_scan", arguments)
    return _case(
        length,
        inputs,
        long_scan,
        Contender(OURS, output_of(selective_scan, dt_softplus=True, backend=backend), backend),
        first_channels(length, D_STATE),
        tolerance(device),
    )


def attention(length: int, scale: str, device: torch.device) -> Case:
    """Causal attention."""
    heads, normal = WIDTH[scale] // HEAD[scale], _normal(device)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ v

    return _case(
        length,
        {name: normal(1, heads, length, HEAD[scale]) for name in ("q", "k", "v")},
        exact,
        Contender(ATTENTION, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        lambda tensor: tensor[:, :, :CHECKED],
        2e-2,
    )


def convolution(length: int, scale: str, device: torch.device) -> Case:
    """A causal convolution with a filter of the sequence's length."""
    width = WIDTH[scale]
    normal = _normal(device, torch.float32)

    def by_fft(x: Tensor, kernel: Tensor) -> Tensor:
        n = 2 * x.shape[-1]
        return torch.fft.irfft(torch.fft.rfft(x, n=n) * torch.fft.rfft(kernel, n=n), n=n)[..., : x.shape[-1]]

    def exact(x: Tensor, kernel: Tensor) -> Tensor:
        steps = torch.arange(x.shape[-1], device=x.device)
        lag = steps[:, None] - steps
        matrix = torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0.0)
        return torch.einsum("cts,bcs->bct", matrix, x)

    decay = torch.exp(-torch.arange(length, device=device) / 32.0)
    return _case(
        length,
        {"x": normal(1, width, length), "kernel": normal(width, length) * decay},
        exact,
        Contender(CONVOLUTION, by_fft),
        lambda tensor: tensor[..., :CHECKED],
        1e-3,
    )


def _case(
    length: int,
    inputs: dict[str, Tensor],
    reference: Callable[..., Tensor],
    contender: Contender,
    part: Callable[[Tensor], Tensor],
    limit: float,
) -> Case:
    return Case(
        op=OP,
        shape={"batch": 1, "length": length},
        inputs=inputs,
        reference=reference,
        contenders=(contender,),
        tolerance=limit,
        part=part,
        passes=PASSES,
    )


def _normal(device: torch.device, dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype = dtype or training_dtype(device)
    return lambda *shape: torch.randn(shape, generator=generator, device=device, dtype=dtype)
