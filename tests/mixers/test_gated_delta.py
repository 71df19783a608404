"""Gated DeltaNet: the published layer in a loop, its initial values, and what it is asked that cannot be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mambaseq.errors import ConfigError
from mambaseq.mixers.gated_delta import GatedDelta


def layer(mixer: GatedDelta, x: torch.Tensor) -> torch.Tensor:
    """The layer as published, one position after another, its convolutions by their sums."""
    p = dict(mixer.named_parameters())
    heads, ratio = mixer.n_value_heads, mixer.n_value_heads // mixer.n_heads

    def convolved(name: str) -> torch.Tensor:
        inputs = F.pad(x @ p[f"{name}_proj.weight"].T, (0, 0, mixer.d_conv - 1, 0))
        taps = p[f"{name}_conv1d.weight"][:, 0].T
        y = sum(taps[i] * inputs[:, i : i + x.shape[1]] for i in range(mixer.d_conv))
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
        if mixer.gate:
            decay = torch.exp(-p["A_log"].exp() * F.softplus(x[:, t] @ p["a_proj.weight"].T + p["dt_bias"]))
            S = S * decay[..., None, None]
        wrong = v[:, t] - torch.einsum("bhvk,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bh,bhv,bhk->bhvk", beta[:, t], wrong, k[:, t])
        outputs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]))
    y = torch.stack(outputs, 1)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["o_norm.weight"]
    if mixer.output_gate:
        y = y * F.silu((x @ p["g_proj.weight"].T).unflatten(-1, (heads, -1)))
    return y.flatten(2) @ p["o_proj.weight"].T


@pytest.mark.parametrize(
    "options",
    [
        {"n_heads": 2, "head_dim": 3, "n_value_heads": 4, "conv_bias": True, "negative_eigenvalues": True},
        {"gate": False, "output_gate": False, "expand_v": 1},
    ],
)
def test_is_the_published_layer(options: dict) -> None:
    torch.manual_seed(0)
    mixer = GatedDelta(8, **options).double()
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
    # by default keys come to 3/4 of the width together
    assert [(GatedDelta(width).n_heads, GatedDelta(width).head_dim) for width in (12, 512)] == [(2, 4), (3, 128)]
    wide = GatedDelta(64, n_heads=3)
    assert (wide.n_heads, wide.head_dim) == (3, 16)


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
