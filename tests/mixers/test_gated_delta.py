"""Gated DeltaNet and Kimi Delta Attention: the published layers in a loop, their parameters, and what cannot be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mambaseq.errors import ConfigError
from mambaseq.mixers.delta import DeltaMixer
from mambaseq.mixers.gated_delta import GatedDelta
from mambaseq.mixers.kda import KDA


def layer(mixer: DeltaMixer, x: torch.Tensor) -> torch.Tensor:
    """The layer as published, one position after another, its convolutions by their sums."""
    p = dict(mixer.named_parameters())
    heads, ratio = mixer.n_value_heads, mixer.n_value_heads // mixer.n_heads

    def convolved(name: str) -> torch.Tensor:
        inputs = F.pad(x @ p[f"{name}_proj.weight"].T, (0, 0, mixer.d_conv - 1, 0))
        taps = p[f"{name}_conv1d.weight"][:, 0].T
        y = torch.stack([taps[i] * inputs[:, i : i + x.shape[1]] for i in range(mixer.d_conv)]).sum(0)
        if f"{name}_conv1d.bias" in p:
            y = y + p[f"{name}_conv1d.bias"]
        return F.silu(y)

    q, k = (convolved(name).unflatten(-1, (mixer.n_heads, -1)) for name in "qk")
    q, k = (value / (value.square().sum(-1, keepdim=True) + 1e-6).sqrt() for value in (q, k))
    q, k = (value.repeat_interleave(ratio, 2) for value in (q / mixer.head_dim**0.5, k))
    v, beta = convolved("v").unflatten(-1, (heads, -1)), torch.sigmoid(x @ p["b_proj.weight"].T)
    beta = beta * (2 if mixer.negative_eigenvalues else 1)
    S, outputs = x.new_zeros(len(x), heads, mixer.value_dim, mixer.head_dim), []
    for t in range(x.shape[1]):
        S = S * decays(mixer, p, x[:, t])
        wrong = v[:, t] - torch.einsum("bhvk,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bh,bhv,bhk->bhvk", beta[:, t], wrong, k[:, t])
        outputs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]))
    y = torch.stack(outputs, 1)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["o_norm.weight"]
    if isinstance(mixer, KDA):
        z = x @ p["g_proj.0.weight"].T @ p["g_proj.1.weight"].T + p["g_proj.1.bias"]
        y = y * torch.sigmoid(z.unflatten(-1, (heads, -1)))
    elif "g_proj.weight" in p:
        y = y * F.silu((x @ p["g_proj.weight"].T).unflatten(-1, (heads, -1)))
    return y.flatten(2) @ p["o_proj.weight"].T


def decays(mixer: DeltaMixer, p: dict[str, torch.nn.Parameter], x: torch.Tensor) -> torch.Tensor:
    """What x `(batch, d_model)` leaves of the state `(batch, heads, value_dim, head_dim)`."""
    if isinstance(mixer, KDA):
        f = x @ p["f_proj.0.weight"].T @ p["f_proj.1.weight"].T + p["dt_bias"]
        f, A = f.unflatten(-1, (mixer.n_value_heads, 1, -1)), p["A_log"].exp()[:, None, None]
        bound = mixer.lower_bound
        return torch.exp(-A * F.softplus(f) if bound is None else bound * torch.sigmoid(A * f))
    if "a_proj.weight" not in p:
        return torch.ones((), dtype=x.dtype)
    return torch.exp(-p["A_log"].exp() * F.softplus(x @ p["a_proj.weight"].T + p["dt_bias"]))[..., None, None]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            GatedDelta,
            {"n_heads": 2, "head_dim": 3, "n_value_heads": 4, "conv_bias": True, "negative_eigenvalues": True},
        ),
        (GatedDelta, {"gate": False, "output_gate": False, "expand_v": 1, "conv_bias": True}),
        (KDA, {"n_heads": 2, "head_dim": 3, "n_value_heads": 4, "expand_v": 2, "negative_eigenvalues": True}),
        (KDA, {"lower_bound": -5.0}),
    ],
)
def test_is_the_published_layer(kind: type, options: dict) -> None:
    torch.manual_seed(0)
    mixer = kind(8, **options).double()
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 20, 8, dtype=torch.float64, requires_grad=True)
    found, expected, weight = mixer(x), layer(mixer, x), torch.randn(2, 20, 8, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    inputs = [x, *mixer.parameters()]
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_names_and_shapes_are_the_published_ones() -> None:
    shapes = {name: tuple(value.shape) for name, value in GatedDelta(512, n_heads=3, head_dim=128).named_parameters()}
    assert shapes == {
        **dict.fromkeys(("q_proj.weight", "k_proj.weight"), (384, 512)),
        **dict.fromkeys(("v_proj.weight", "g_proj.weight"), (768, 512)),
        **dict.fromkeys(("a_proj.weight", "b_proj.weight"), (3, 512)),
        **dict.fromkeys(("q_conv1d.weight", "k_conv1d.weight"), (384, 1, 4)),
        "v_conv1d.weight": (768, 1, 4),
        **dict.fromkeys(("A_log", "dt_bias"), (3,)),
        "o_norm.weight": (256,),
        "o_proj.weight": (512, 768),
    }
    shapes = {name: tuple(value.shape) for name, value in KDA(512, n_heads=4, head_dim=64).named_parameters()}
    assert {name: shape for name, shape in shapes.items() if "conv" not in name} == {
        **dict.fromkeys(("q_proj.weight", "k_proj.weight", "v_proj.weight"), (256, 512)),
        **dict.fromkeys(("f_proj.0.weight", "g_proj.0.weight"), (64, 512)),
        **dict.fromkeys(("f_proj.1.weight", "g_proj.1.weight"), (256, 64)),
        "g_proj.1.bias": (256,),
        "b_proj.weight": (4, 512),
        "A_log": (4,),
        "dt_bias": (256,),
        "o_norm.weight": (64,),
        "o_proj.weight": (512, 256),
    }


@pytest.mark.parametrize(
    ("kind", "width", "options", "heads"),
    [
        (GatedDelta, 12, {}, (3, 3)),
        (GatedDelta, 768, {}, (6, 96)),  # 3/4 of the width together, as published
        (GatedDelta, 1024, {}, (6, 128)),
        (GatedDelta, 64, {"n_heads": 3}, (3, 16)),
        (GatedDelta, 64, {"head_dim": 16}, (3, 16)),
        (GatedDelta, 1, {}, (2, 1)),
        (KDA, 512, {}, (4, 128)),
        (KDA, 17, {}, (2, 8)),  # no divisor: nearly as many
    ],
)
def test_heads_by_default(kind: type, width: int, options: dict, heads: tuple[int, int]) -> None:
    mixer = kind(width, **options)
    assert (mixer.n_heads, mixer.head_dim) == heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 2, "n_value_heads": 3}, r"n_value_heads 3 is no multiple of n_heads 2.*such as 2"),
        ({"head_dim": 3, "expand_v": 1.5}, r"1\.5 \* 3 is not. Set expand_v to 1\.33333"),
        ({"head_dim": 3, "expand_v": 0.0}, r"0 \* 3 is not"),
        ({"expand_v": -1.0}, "expand_v"),
        ({"n_heads": 0}, "n_heads must be positive, not 0"),
        ({"d_conv": 0}, "d_conv must be positive, not 0"),
        ({"eps": -1.0}, "eps"),
        ({"backend": "tritn"}, "there is no backend 'tritn'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GatedDelta(8, **options)


def test_a_bound_of_decays_is_below_0() -> None:
    with pytest.raises(ConfigError, match="lower_bound must be below 0, not 0"):
        KDA(8, lower_bound=0.0)
