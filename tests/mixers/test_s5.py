"""S5 against its paper's equations, step by step in float64."""

from __future__ import annotations

import pytest
import torch
from mixers.recurrence import assert_same

from mambaseq.errors import ConfigError
from mambaseq.mixers.s5 import S5


@pytest.mark.parametrize("length", [1, 150])
def test_equals_the_recurrence_with_gradients(length: int) -> None:
    torch.manual_seed(0)
    ssm = S5(5, d_state=6, blocks=2).ssm
    x = torch.randn(2, length, 5, dtype=torch.float64)
    weight = torch.randn_like(x)
    A = torch.complex(-ssm.A_log_real.double().exp(), ssm.A_imag.double())
    B, C = (torch.view_as_complex(value.double()) for value in (ssm.B, ssm.C))
    Abar = torch.exp(A * ssm.log_dt.double().exp())
    Bbar = ((Abar - 1) / A)[:, None] * B  # eq. 6 of the paper
    h, ys = torch.zeros(2, 6, dtype=A.dtype), []
    for t in range(length):
        h = Abar * h + x[:, t].to(A.dtype) @ Bbar.mT
        ys.append(2 * (h @ C.mT).real + ssm.D * x[:, t])
    y, state = ssm(x, return_state=True)
    results = [
        [value, *torch.autograd.grad((value * weight).sum(), list(ssm.parameters()))]
        for value in (y, torch.stack(ys, 1))
    ]
    assert_same(results[0][:1], results[1][:1], 1e-10)
    assert_same(results[0][1:], results[1][1:], 1e-6)
    assert_same([state], [h], 1e-10)


def test_starts_as_blocks_of_hippo() -> None:
    ssm = S5(5, d_state=12, blocks=3).ssm
    n = torch.arange(8, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    normal = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1) + root[:, None] * root / 2
    imag = torch.linalg.eigvals(normal).imag
    assert_same([ssm.A_imag.view(3, 4).double()], [imag[imag > 0].sort().values.repeat(3, 1)], 1e-6)
    torch.testing.assert_close(-ssm.A_log_real.exp(), torch.full((12,), -0.5))


def test_starts_with_outputs_as_large_as_inputs() -> None:
    torch.manual_seed(0)
    ssm = S5(64, dt_min=0.1, dt_max=0.1).ssm
    torch.nn.init.zeros_(ssm.D)
    y, _ = ssm(torch.randn(2, 500, 64))
    assert 0.03 < y[:, 200:].std() < 3


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="blocks must divide"):
        S5(8, d_state=10, blocks=4)
