"""The Legendre memory unit against its papers' equations, in their basis, step by step in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mixers.recurrence import assert_same

from mambaseq.errors import ConfigError
from mambaseq.mixers.lmu import LMU


def published(order: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Abar and Bbar of eq. 2 of Voelker et al. by zero-order hold, float64, in the basis of that paper."""
    A, B = np.zeros((order, order)), np.zeros(order)
    for i in range(order):
        B[i] = (2 * i + 1) / theta * (-1) ** i
        for j in range(order):
            A[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1) ** (i - j + 1))
    Abar = torch.linalg.matrix_exp(torch.from_numpy(A))
    return Abar, torch.from_numpy(np.linalg.solve(A, (Abar.numpy() - np.eye(order)) @ B))


def to_published(memory: torch.Tensor) -> torch.Tensor:
    i = torch.arange(memory.shape[-1], dtype=torch.float64)
    return memory * (1 - 2 * (i % 2)) * torch.sqrt(2 * i + 1)


def test_equals_the_published_recurrence_with_gradients() -> None:
    torch.manual_seed(0)
    order = 12
    mixer = LMU(5, d_state=order, d_memory=2, theta=40.0, d_hidden=7, activation="tanh").double()
    x = torch.randn(2, 150, 5, dtype=torch.float64)
    Abar, Bbar = published(order, 40.0)
    m, ys = torch.zeros(2, 2, order, dtype=torch.float64), []
    i = torch.arange(order, dtype=torch.float64)
    ours = (1 - 2 * (i % 2)) / torch.sqrt(2 * i + 1)
    for t in range(150):
        u = F.linear(x[:, t], mixer.in_proj.weight, mixer.in_proj.bias)
        m = m @ Abar.mT + u[..., None] * Bbar
        read = (m * ours).flatten(1) @ mixer.memory_proj.weight.mT
        hidden = torch.tanh(read + x[:, t] @ mixer.x_proj.weight.mT + mixer.x_proj.bias)
        ys.append(hidden @ mixer.out_proj.weight.mT + mixer.out_proj.bias)
    expected = torch.stack(ys, 1)
    y, state = mixer(x, return_state=True)
    results = [[v, *torch.autograd.grad(v.square().sum(), list(mixer.parameters()))] for v in (y, expected)]
    assert_same(*results, 1e-10)
    assert_same([to_published(state.memory)], [m], 1e-10)


def test_remembers_a_window() -> None:
    """Of a slow wave, the memory gives u(t - theta s) as a sum of shifted Legendre polynomials in s (eq. 3)."""
    mixer = LMU(1, d_state=10, d_memory=1, theta=100.0)
    torch.nn.init.ones_(mixer.in_proj.weight)
    torch.nn.init.zeros_(mixer.in_proj.bias)
    times = torch.arange(400.0)
    _, state = mixer(torch.sin(2 * math.pi * times / 120)[None, :, None], return_state=True)
    m = to_published(state.memory[0, 0].detach().double()).numpy()
    for share in (0.1, 0.5, 0.9):
        remembered = np.polynomial.legendre.legval(2 * share - 1, m)
        # the input is held for a step: half a step later on the average
        assert remembered == pytest.approx(math.sin(2 * math.pi * (399.5 - 100 * share) / 120), abs=0.01)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="theta"):
        LMU(4, theta=0.0)
    with pytest.raises(ConfigError, match="activation"):
        LMU(4, activation="sin")
