"""Gated linear attention: the published layer in a loop, and what cannot be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mambaseq.errors import ConfigError
from mambaseq.mixers.gla import GLA


def layer(mixer: GLA, x: torch.Tensor) -> torch.Tensor:
    p = dict(mixer.named_parameters())
    g = x @ p["gk_proj.0.weight"].T @ p["gk_proj.1.weight"].T + p["gk_proj.1.bias"]
    q, k, v, z = (x @ p[f"{name}_proj.weight"].T for name in "qkvg")
    q, k, v, z, g = (value.unflatten(-1, (mixer.n_heads, -1)) for value in (q, k, v, z, g))
    S, outputs = 0, []
    for t in range(x.shape[1]):
        S = torch.sigmoid(g[:, t, :, None]) ** (1 / mixer.normalizer) * S + v[:, t, :, :, None] * k[:, t, :, None]
        outputs.append((S * q[:, t, :, None]).sum(-1) / mixer.key_dim**0.5)
    y = torch.stack(outputs, 1)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["g_norm_swish_gate.weight"] * F.silu(z)
    return y.flatten(2) @ p["o_proj.weight"].T


def test_is_the_published_layer() -> None:
    torch.manual_seed(0)
    mixer = GLA(8, n_heads=2).double()
    mixer.g_norm_swish_gate.weight.data += 0.3 * torch.randn(4)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 3}, "n_heads 3 does not divide the 4 channels of queries and the 8 of values"),
        ({"expand_k": 0.1}, r"expand_k \* d_model, .* 0.1 \* 8 is not. Set expand_k to 0.125"),
        ({"expand_k": 0.3}, r"0.3 \* 8 is not. Set expand_k to 0.25, or d_model to another"),
        ({"expand_v": 0.7}, r"expand_v \* d_model, .* 0.7 \* 8 is not. Set expand_v to 0.75"),
        ({"expand_v": 0.0}, "expand_v"),
        ({"gate_rank": 0}, "gate_rank must be positive, not 0"),
        ({"normalizer": 0.0}, "normalizer"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GLA(8, **options)


def test_a_share_that_is_not_exact_in_binary_is_whole() -> None:
    mixer = GLA(100, n_heads=1, expand_k=0.29)  # 0.29 * 100 is 28.999999999999996
    assert mixer.key_dim == 29
