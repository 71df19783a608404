"""The Mamba block as published: initial values and names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mambaseq.errors import ConfigError
from mambaseq.mixers import mamba
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


ABLATIONS = [
    {"selective_B": False},
    {"selective_dt": False, "selective_C": False, "A_init": "random"},
    {"complex": True},
    {"selective_dt": False, "selective_B": False, "selective_C": False, "complex": True},
]


def block_in_a_loop(mixer: Mamba, x: torch.Tensor) -> torch.Tensor:
    """Algorithm 2, one position after another, from the parameters alone; what is constant is repeated."""
    p = dict(mixer.named_parameters())
    n, complex_ = mixer.d_state, "A_imag" in p
    x, z = (x @ p["in_proj.weight"].T).chunk(2, dim=-1)
    x = F.pad(x.transpose(1, 2), (3, 0)).unfold(-1, 4, 1)
    x = F.silu((x * p["conv1d.weight"]).sum(-1) + p["conv1d.bias"][:, None]).transpose(1, 2)
    A = -torch.exp(p["A_log"])
    A = A + 1j * p["A_imag"] if complex_ else A
    h, ys = torch.zeros(len(x), *A.shape, dtype=A.dtype), []
    for t in range(x.shape[1]):
        u = x[:, t]
        left = u @ p["x_proj.weight"].T if "x_proj.weight" in p else u[:, :0]
        if "dt_proj.weight" in p:
            low, left = left[:, : mixer.dt_rank], left[:, mixer.dt_rank :]
            dt = F.softplus(low @ p["dt_proj.weight"].T + p["dt_proj.bias"])
        else:
            dt = F.softplus(p["dt_bias"]).expand_as(u)
        matrices = []
        for name in ("B", "C"):
            if name in p:
                M = p[name]
            else:
                M, left = left[:, None, : n * (1 + complex_)], left[:, n * (1 + complex_) :]
            if complex_:
                M = M[..., ::2] + 1j * M[..., 1::2]
            matrices.append(M)
        B, C = matrices
        h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B
        y = (h * C).sum(-1)
        ys.append(((2 * y.real if complex_ else y) + p["D"] * u) * F.silu(z[:, t]))
    return torch.stack(ys, 1) @ p["out_proj.weight"].T


@pytest.mark.parametrize("options", [{}, *ABLATIONS])
def test_ablations_equal_a_loop(options: dict) -> None:
    torch.manual_seed(0)
    mixer = Mamba(6, d_state=4, dt_rank=3, **options).double()
    x = torch.randn(2, 21, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *mixer.parameters()]
    weight = torch.randn_like(x)
    found, expected = (
        [y, *torch.autograd.grad((y * weight).sum(), inputs)] for y in (mixer(x), block_in_a_loop(mixer, x))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_initial_A() -> None:
    """Table 8's, with the constants of the others."""
    mixer = Mamba(8, complex=True, selective_B=False, selective_C=False)
    torch.testing.assert_close(mixer._A(), torch.complex(torch.full((16, 16), -0.5), torch.arange(16.0).repeat(16, 1)))
    assert "dt_proj.weight" in dict(mixer.named_parameters())
    assert mixer.x_proj.weight.shape == (1, 16)
    torch.testing.assert_close(Mamba(8, A_init="constant")._A(), torch.full((16, 16), -0.5))
    drawn = torch.log(-Mamba(64, A_init="random")._A())
    assert abs(drawn.mean()) < 0.1
    assert abs(drawn.std() - 1) < 0.1
    dt = F.softplus(Mamba(64, selective_dt=False).dt_bias)
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001


@pytest.mark.parametrize("options", ABLATIONS)
def test_kernels_of_whole_blocks_leave_ablations_alone(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(mamba, "can_step", lambda *_: asked.append(1))
    Mamba(8).step_(torch.randn(1, 1, 8), Mamba(8).init_state(1))
    assert asked
    asked.clear()
    mixer = Mamba(8, **options)
    mixer.step_(torch.randn(1, 1, 8), mixer.init_state(1))
    assert not asked
    assert not mixer._is_plain()


@pytest.mark.parametrize(
    "options",
    [
        {"complex": True, "A_init": "s4d-real"},
        {"A_init": "s4d-lin"},
        {"A_init": "legs"},
        {"lti": True, "complex": True},
        {"lti": True, "selective_B": False},
        {"lti": True, "A_init": "random"},
    ],
)
def test_ablations_that_do_not_go_together_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"complex|A_init"):
        Mamba(8, **options)
