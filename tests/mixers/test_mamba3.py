"""Mamba-3: its complex state in a loop, its parameters, and what cannot be."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from mambaseq.errors import ConfigError
from mambaseq.mixers.mamba3 import Mamba3
from mambaseq.ops.dispatch import relative_rms_error
from mambaseq.tasks.optimizer import parameter_groups


def block(mixer: Mamba3, x: torch.Tensor) -> torch.Tensor:
    """The block with a complex state, which turns as it decays: B and C stay as they are, and y is real."""
    p, heads, n = dict(mixer.named_parameters()), mixer.n_heads, mixer.d_state
    z, v, B, C, dt, A, trap, angles = (x @ p["in_proj.weight"].T).split(mixer.widths, -1)

    def pairs(M: torch.Tensor, name: str) -> torch.Tensor:
        M = M.unflatten(-1, (mixer.rank, mixer.n_groups, n))
        M = M / (M.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}_norm.weight"]
        M = M.repeat_interleave(heads // mixer.n_groups, -2).transpose(-2, -3) + p[f"{name}_bias"]
        if mixer.several:
            return torch.complex(M[..., : n // 2], M[..., n // 2 :])
        return torch.complex(M[..., ::2], M[..., 1::2])

    B, C = pairs(B, "B"), pairs(C, "C")  # (batch, length, heads, rank, n / 2)
    dt, trap = F.softplus(dt + p["dt_bias"]), torch.sigmoid(trap)
    rate = (1 + A.exp()).log() if mixer.softplus_rate else torch.where(A >= 0, 1 + A, 1 / (1 - A))
    A = -rate.clamp(min=1e-4)
    turn = F.pad(math.pi * torch.tanh(angles), (0, n // 2 - mixer.n_angles))
    v, z = v.unflatten(-1, (heads, 1, -1)), z.unflatten(-1, (heads, 1, -1))
    if mixer.several:
        v, z = v * p["mimo_x"], z * p["mimo_z"]
    h = torch.zeros(len(x), heads, mixer.head_dim, n // 2, dtype=torch.complex128)
    before, outputs = torch.zeros_like(h), []
    for t in range(x.shape[1]):
        step, share = dt[:, t, :, None, None], trap[:, t, :, None, None]
        now = torch.einsum("bhrp,bhrn->bhpn", v[:, t].to(B.dtype), B[:, t])
        decay = torch.exp(
            step * torch.complex(A[:, t, :, None, None].expand(-1, -1, 1, n // 2), -turn[:, t, None, None])
        )
        h = decay * (h + (1 - share) * step * before) + share * step * now
        outputs.append(torch.einsum("bhpn,bhrn->bhrp", h, C[:, t].conj()).real)
        before = now
    y = torch.stack(outputs, 1) + p["D"][:, None, None] * v
    if mixer.out_norm:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"].view(heads, 1, -1)
    y = y * F.silu(z)
    if mixer.several:
        y = y * p["mimo_o"]
    return y.sum(-2).flatten(2) @ p["out_proj.weight"].T


@pytest.mark.parametrize(
    "options",
    [
        {"rope_fraction": 1.0, "n_groups": 2},
        {"out_norm": True, "softplus_rate": True},
        {"rank": 2, "n_groups": 2},
        {"rank": 3, "rope_fraction": 1.0, "out_norm": True},
    ],
)
def test_is_a_complex_state_that_turns(options: dict) -> None:
    torch.manual_seed(0)
    mixer = Mamba3(6, d_state=8, head_dim=3, **options).double()
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    found, expected, weight = mixer(x), block(mixer, x), torch.randn(2, 20, 6, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    inputs = [x, *mixer.parameters()]
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
@pytest.mark.parametrize(
    "options", [{}, {"rank": 4, "rope_fraction": 1.0}, {"rank": 3, "n_groups": 2}, {"out_norm": True}]
)
def test_kernels_in_half_precision(options: dict) -> None:
    """Under autocast, against the same in float64 on a CPU: outputs, gradients, the state handed on, packed."""
    torch.manual_seed(0)
    exact = Mamba3(128, d_state=64, **options).double()
    for parameter in exact.parameters():
        parameter.data += 0.1 * parameter.std(correction=0) * torch.randn_like(parameter)
    mixer = copy.deepcopy(exact).float().cuda()
    x = torch.randn(1, 200, 128, dtype=torch.float64)
    weight = torch.randn(1, 200, 128, dtype=torch.float64)
    results = []
    for run, given in ((exact, x), (mixer, x.float().cuda())):
        leaf = given.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            first, state = run(leaf[:, :77], return_state=True)
            second, state = run(leaf[:, 77:], state=state, return_state=True)
            bounds = torch.tensor([0, 0, 77, 200], dtype=torch.int32, device=leaf.device)
            packed = run(leaf, cu_seqlens=bounds)
            y = torch.cat([first, second], 1)
            loss = (y.float() * weight.to(leaf)).sum() + (packed.float() * weight.to(leaf)).sum()
        found = torch.autograd.grad(loss, [leaf, *run.parameters()])
        results.append([y, packed, *state.tensors().values(), *found])
    names = ["y", "packed", *state.tensors(), "x", *dict(exact.named_parameters())]
    errors = {name: relative_rms_error(a.cpu(), e) for name, a, e in zip(names, results[1], results[0], strict=True)}
    summed = {"dt_bias", "B_bias", "C_bias", "D", "B_norm.weight", "C_norm.weight"}  # terms cancel, their rounding not
    wrong = {name: error for name, error in errors.items() if not error < (8e-2 if name in summed else 2e-2)}
    assert not wrong


def test_names_and_shapes_are_the_published_ones() -> None:
    mixer = Mamba3(64, d_state=16, head_dim=32, rank=4, out_norm=True)
    assert {name: tuple(value.shape) for name, value in mixer.named_parameters()} == {
        "in_proj.weight": (2 * 128 + 2 * 4 * 16 + 3 * 4 + 4, 64),
        **dict.fromkeys(("dt_bias", "D"), (4,)),
        **dict.fromkeys(("B_bias", "C_bias"), (4, 4, 16)),
        **dict.fromkeys(("B_norm.weight", "C_norm.weight"), (16,)),
        **dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (4, 4, 32)),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    single = dict(Mamba3(64).named_parameters())
    assert not {"mimo_x", "norm.weight"} & single.keys()
    assert single["B_bias"].shape == (2, 1, 128)


def test_biases_and_dynamics_have_no_weight_decay() -> None:
    mixer = Mamba3(8, d_state=4, rank=2)
    decays, rest = parameter_groups(mixer, 0.1)
    names = {id(value): name for name, value in mixer.named_parameters()}
    assert {names[id(value)] for value in decays["params"]} == {
        *("in_proj.weight", "out_proj.weight", "mimo_x", "mimo_z", "mimo_o")
    }
    assert rest["weight_decay"] == 0


@pytest.mark.parametrize("softplus_rate", [False, True])
def test_gradients_where_nothing_comes_in(softplus_rate: bool) -> None:
    """Of a position of zeros the rate stands where its two branches meet."""
    torch.manual_seed(0)
    mixer = Mamba3(8, d_state=4, head_dim=4, softplus_rate=softplus_rate).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    x[:, 2] = 0
    assert torch.autograd.gradcheck(mixer, (x.requires_grad_(),), eps=1e-6, atol=1e-6)


def test_angles_of_a_long_past_turn_as_exactly_as_those_of_a_short_one() -> None:
    """A state's angles are sums that nothing wraps, in float64: in float32, steps of a millionth would be lost."""
    torch.manual_seed(0)
    mixer, x = Mamba3(6, d_state=8, head_dim=3), torch.randn(1, 5, 6)
    near = mixer.init_state(1)
    far = near.clone()
    far.angle.add_(2 * math.pi * 10**6)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, state=far), mixer(x, state=near), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, r"head_dim 5 does not divide expand \* d_model = 16"),
        ({"head_dim": 8, "n_groups": 3}, "n_groups 3 does not divide the 2 heads"),
        ({"rope_fraction": 0.25}, r"rope_fraction must be 0\.5 or 1, not 0\.25"),
        ({"d_state": 2}, "leaves no whole pairs to turn. Set d_state to an even number of at least 4"),
        ({"d_state": 5, "rope_fraction": 1.0}, "an even number of at least 2"),
        ({"rank": 0}, "rank must be positive, not 0"),
        ({"A_floor": 0.0}, "A_floor"),
        ({"dt_min": 1.0}, "dt_min"),
        ({"backend": "tritn"}, "there is no backend 'tritn'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mamba3(8, **options)
