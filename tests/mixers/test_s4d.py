"""S4D's kernel against a direct evaluation in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mambaseq.mixers.s4d import S4D


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize(
    "options", [{"init": "lin"}, {"init": "inv"}, {"init": "legs", "mode": "scan"}, {"real": True, "init": "real"}]
)
def test_response_to_an_impulse_is_the_kernel_evaluated_directly(options: dict, discretization: str) -> None:
    """K_l = 2 Re sum_n C_n Bbar_n Abar_n^l, plus D at 0 (without the 2 Re where A is real)."""
    torch.manual_seed(0)
    ssm = S4D(6, d_state=8, discretization=discretization, **options).ssm
    torch.nn.init.normal_(ssm.B)
    p = {name: value.detach().double().numpy() for name, value in ssm.named_parameters()}
    real = options.get("real", False)
    A = -np.exp(p["A_log_real"]) + (0 if real else 1j * p["A_imag"])
    C = p["C"] if real else p["C"][..., 0] + 1j * p["C"][..., 1]
    dt = np.exp(p["log_dt"])[:, None]
    if discretization == "zoh":
        Abar = np.exp(dt * A)
        Bbar = (Abar - 1) / A * p["B"]
    else:
        Abar = (1 + dt * A / 2) / (1 - dt * A / 2)
        Bbar = dt * p["B"] / (1 - dt * A / 2)
    length = 300
    kernel = np.stack([(C * Bbar * Abar**step).sum(-1) for step in range(length)])
    kernel = kernel if real else 2 * kernel.real
    kernel[0] += p["D"]

    impulse = torch.zeros(1, length, 6, dtype=torch.float64)
    impulse[:, 0] = 1
    with torch.no_grad():
        exact = ssm(impulse)[0][0].numpy()
        single = ssm(impulse.float())[0][0].numpy()
    # dt and A are made of the parameters in float32, whose rounding grows with the power: 2^-24 of a phase of 10^3
    assert np.linalg.norm(exact - kernel) <= 2e-5 * np.linalg.norm(kernel)
    assert np.linalg.norm(single - kernel) <= 2e-5 * np.linalg.norm(kernel)
