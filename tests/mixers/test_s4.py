"""S4 against its paper's equations: the full matrix, discretised, run step by step in float64."""

from __future__ import annotations

import pytest
import torch
from mixers.recurrence import assert_same, bilinear, recurrence

from mambaseq.errors import ConfigError
from mambaseq.mixers.hippo import legs_normal, transition
from mambaseq.mixers.s4 import DPLRSSM, S4
from mambaseq.ops.state_space import generating


def full_matrices(ssm: DPLRSSM) -> tuple[torch.Tensor, ...]:
    """A = diag - P P^*, B and C `(channels, …)` with both halves of the conjugate pairs."""

    def both(value: torch.Tensor) -> torch.Tensor:
        value = torch.view_as_complex(value.double().contiguous())
        return torch.cat([value, value.conj()], -1)

    diagonal = torch.complex(-ssm.A_log_real.double().exp(), ssm.A_imag.double())
    diagonal = torch.cat([diagonal, diagonal.conj()], -1)
    P, B = both(ssm.P), both(ssm.B)
    A = torch.diag_embed(diagonal) - P[:, :, None] * P[:, None].conj()
    copies = ssm.channels // ssm.n_ssm
    return A.repeat_interleave(copies, 0), B.repeat_interleave(copies, 0), both(ssm.C)[:, None]


@pytest.mark.parametrize("length", [1, 67, 200])
@pytest.mark.parametrize("mode", ["blocks", "fft"])
def test_equals_the_recurrence_of_the_full_matrix_with_gradients(mode: str, length: int) -> None:
    torch.manual_seed(0)
    ssm = S4(6, d_state=4, n_ssm=2, mode=mode).ssm
    for parameter in ssm.parameters():  # off their initialisation, where A is special
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, length, 6, dtype=torch.float64)
    weight = torch.randn_like(x)
    A, B, C = full_matrices(ssm)
    y, h = recurrence(*bilinear(A, B, ssm.log_dt.double().exp()), C, x.to(A.dtype))
    expected = y[..., 0].real + ssm.D * x
    parameters = list(ssm.parameters())
    results = [[e, *torch.autograd.grad((e * weight).sum(), parameters)] for e in (ssm(x)[0], expected)]
    # gradients are summed in the parameters' float32
    assert_same(results[0][:1], results[1][:1], 1e-9)
    assert_same(results[0][1:], results[1][1:], 1e-6)
    _, state = ssm(x, return_state=True)
    assert_same([state], [h[..., :4]], 1e-10)


def test_the_fft_kernel_does_not_depend_on_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "_ELEMENTS", 2**16)  # several pieces of the circle
    torch.manual_seed(0)
    ssm = S4(4, mode="fft").ssm
    impulse = torch.zeros(1, 1500, 4, dtype=torch.float64)
    impulse[:, 0] = 1
    long, _ = ssm(impulse)
    assert_same([ssm(impulse[:, :10])[0]], [long[:, :10]], 1e-8)
    ssm.mode = "blocks"
    assert_same([long], [ssm(impulse)[0]], 1e-8)


def test_starts_as_hippo() -> None:
    """V (diag - P P^*) V^* is the matrix of HiPPO-LegS, and B its B, with V from the normal part."""
    ssm = S4(2, d_state=8).ssm
    A, B, _ = full_matrices(ssm)
    _, half = legs_normal(16)
    V = torch.cat([half, half.conj()], 1)
    expected_A, expected_B = transition("legs", 16)
    assert_same([V @ A[0] @ V.mH], [expected_A.to(V.dtype)], 1e-6)
    assert_same([V @ B[0]], [expected_B.to(V.dtype)], 1e-6)
    n = torch.arange(16.0)  # equation 1 of the paper, written again
    written = torch.stack([torch.where(n < k, (2 * k + 1).sqrt() * (2 * n + 1).sqrt(), (n == k) * (n + 1)) for k in n])
    assert_same([expected_A.float()], [-written], 1e-6)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_ssm must divide"):
        S4(8, n_ssm=3)
    with pytest.raises(ConfigError, match="d_state must be positive"):
        S4(8, d_state=0)
    with pytest.raises(ConfigError, match="dt_min"):
        S4(8, dt_min=0.1, dt_max=0.01)
