"""The Mamba block as published: initial values and names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mambaseq.errors import ConfigError
from mambaseq.mixers.mamba import Mamba
from mambaseq.mixers.s4d import DiagonalSSM, initial_A
from mambaseq.models import causal_lm


def test_initial_values_survive_model_building() -> None:
    model = causal_lm(vocab_size=11, d_model=32, n_layers=5)
    reference = Mamba(32)
    bound = math.sqrt(3 / (3 * 64))  # kaiming uniform with a = sqrt(5): 1 / sqrt(fan_in)
    for layer in model.backbone.layers:
        mixer = layer.mixer
        dt = F.softplus(mixer.dt_proj.bias)
        assert dt.min() >= 1e-3 * 0.999
        assert dt.max() <= 0.1 * 1.001
        assert torch.equal(mixer.A_log, torch.arange(1, 17).float().log().repeat(64, 1))
        assert torch.equal(mixer.D, torch.ones(64))
        assert mixer.dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5
        # the residual scaling of out_proj: 1 / sqrt(n_layers)
        assert mixer.out_proj.weight.abs().max() <= bound / math.sqrt(5)
        assert mixer.out_proj.weight.abs().max() > 0.9 * bound / math.sqrt(5)
    assert reference.out_proj.weight.abs().max() > 0.9 * bound


def test_names_and_shapes_are_those_of_the_published_checkpoints() -> None:
    shapes = {name: tuple(p.shape) for name, p in Mamba(48).named_parameters()}
    assert shapes == {
        "A_log": (96, 16),
        "D": (96,),
        "in_proj.weight": (192, 48),
        "conv1d.weight": (96, 1, 4),
        "conv1d.bias": (96,),
        "x_proj.weight": (35, 96),
        "dt_proj.weight": (96, 3),
        "dt_proj.bias": (96,),
        "out_proj.weight": (48, 96),
    }


def test_s4d_initialisations() -> None:
    lin = initial_A("lin", 4, False)
    torch.testing.assert_close(lin, torch.complex(torch.full((4,), -0.5), math.pi * torch.arange(4.0)))
    # S4D-Inv, N = 8: N/pi (N/(2n+1) - 1)
    inv = initial_A("inv", 4, False)
    torch.testing.assert_close(inv.imag, torch.tensor([8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)]))
    torch.testing.assert_close(initial_A("real", 3, True), torch.tensor([-1.0, -2.0, -3.0]))
    # HiPPO-LegS of order 8 plus its rank-one part is normal: -1/2 + skew; its eigenvalues by numpy
    n = torch.arange(8, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    hippo = -torch.tril(root[:, None] * root[None], -1) - torch.diag(n + 1)
    normal = hippo + 0.5 * root[:, None] * root[None]
    expected = torch.linalg.eigvals(normal)
    torch.testing.assert_close(expected.real, torch.full((8,), -0.5, dtype=torch.float64))
    positive = expected.imag[expected.imag > 0].sort().values
    torch.testing.assert_close(initial_A("legs", 4, False).imag, positive.float())
    with pytest.raises(ConfigError, match="real"):
        initial_A("lin", 4, True)
    with pytest.raises(ConfigError, match="real"):
        initial_A("real", 4, False)


def test_a_diagonal_system_is_stable_and_starts_in_range() -> None:
    system = DiagonalSSM(20, 8)
    dt, A, _, _ = system.system()
    assert dt.min() >= 1e-3
    assert dt.max() <= 0.1
    assert (A.real < 0).all()


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="positive"):
        Mamba(8, d_state=0)
