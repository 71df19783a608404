"""What a stretch of time does to a state is what the scan itself does to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambaseq.ops import selective_scan
from mambaseq.ops.selective_scan import ends

CHANNELS, STATES = 18, 3


def close(actual: Tensor, expected: Tensor, tolerance: float = 4e-6) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
def test_states_behind_and_gradients_before(kernel: bool, is_complex: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel and is_complex:
        pytest.skip("the kernels are for real states")
    if kernel:
        monkeypatch.setattr(ends, "_runs_kernel", lambda dt, *others: True)
        monkeypatch.setattr(ends, "_SPLIT", 32)
    torch.manual_seed(0)
    length = 75
    x, dt, z, dy = torch.randn(4, 2, length, CHANNELS)
    A: Any = -3 * torch.rand(CHANNELS, STATES) - 0.01
    dt[..., :4] += 8  # some forget everything within a split, and some nothing
    dt[..., 4:8] -= 8
    if is_complex:
        A = torch.complex(A, 9 * torch.randn(CHANNELS, STATES))
    B, C = torch.randn(2, 2, length, STATES)
    bias = torch.randn(CHANNELS)
    state = torch.zeros(2, CHANNELS, STATES, dtype=A.dtype, requires_grad=True)
    rest: dict[str, Any] = {"dt_bias": bias, "dt_softplus": True, "backend": "torch"}
    y, final = selective_scan(x, dt, A, B, C, z=z, initial_state=state, **rest)
    (gradient,) = torch.autograd.grad(y, state, dy)
    ones = torch.ones_like(state).detach()
    _, left = selective_scan(torch.zeros_like(x), dt, A, B, C, initial_state=ones, **rest)
    behind, decay = ends.state_behind(x, dt, A, B, bias, True)
    close(behind, final.detach())
    close(decay, left)
    close(ends.gradient_before(dy, dt, A, C, z, bias, True), gradient)
    close(ends.decay(dt, A, bias, True), left)


def test_no_position_is_read_whose_weight_is_no_number() -> None:
    """What is forgotten may be anything."""
    x, dt = torch.full((1, 700, 2), torch.nan), torch.full((1, 700, 2), 1.0)
    x[:, 300:] = 1
    A, B = torch.full((2, 1), -1.0), torch.ones(1, 700, 1)
    behind, decay = ends.state_behind(x, dt, A, B)
    close(behind, torch.full((1, 2, 1), 1 / (1 - torch.exp(torch.tensor(-1.0)).item())))
    assert not decay.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_say_what_the_scan_does_over_thousands_of_positions(cuda: torch.device, dtype: torch.dtype) -> None:
    """Fast decays, whose far positions are not read, beside slow ones."""
    torch.manual_seed(0)
    length, channels = 5000, 80
    x, dt, z, dy = torch.randn(4, 1, length, channels, device=cuda).to(dtype)
    bias = torch.linspace(-14, 1, channels, device=cuda)
    A = -torch.arange(1, 17, device=cuda).float().repeat(channels, 1)
    B, C = torch.randn(2, 1, length, 16, device=cuda).to(dtype)
    state = torch.zeros(1, channels, 16, device=cuda, requires_grad=True)
    y, final = selective_scan(x, dt, A, B, C, z=z, dt_bias=bias, dt_softplus=True, initial_state=state)
    (gradient,) = torch.autograd.grad(y, state, dy)
    close(ends.state_behind(x, dt, A, B, bias, True)[0], final.detach(), 1e-4)
    close(ends.gradient_before(dy, dt, A, C, z, bias, True), gradient, 1e-4)
