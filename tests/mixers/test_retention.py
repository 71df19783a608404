"""Retention against the recurrence of arXiv:2307.08621 in complex numbers, written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mambaseq.errors import ConfigError
from mambaseq.mixers.retention import Retention


def written_out(mixer: Retention, x: torch.Tensor, first_position: int = 0) -> torch.Tensor:
    """Equations 3 to 8: S_n = γ S_{n-1} + (k_n e^{inθ})† v_n and o_n = Re (q_n e^{inθ}) S_n, the pairs of a head as
    complex numbers; GroupNorm over the heads, swish gate, output."""
    heads, key, value, pairs = mixer.n_heads, mixer.head_dim, mixer.v_dim, mixer.head_dim // 2
    batch, length, d_model = x.shape
    theta = torch.tensor([10000.0 ** (-i / pairs) for i in range(pairs)], dtype=torch.float64)
    weights = mixer.in_proj.weight.split([d_model, d_model, mixer.d_inner, mixer.d_inner])
    q, k, v, gate = (x @ weight.T for weight in weights)
    rows = []
    for head in range(heads):
        gamma = 1 - 2 ** (-5 - head)
        own_q, own_k = (M.unflatten(-1, (heads, key))[:, :, head] for M in (q, k))
        own_q, own_k = (torch.complex(M[..., :pairs], M[..., pairs:]) for M in (own_q, own_k))
        own_v, S, outputs = v.unflatten(-1, (heads, value))[:, :, head], torch.zeros(batch, pairs, value), []
        for n in range(length):
            turn = torch.polar(torch.ones_like(theta), (first_position + n) * theta)
            S = gamma * S + (own_k[:, n] * turn).conj()[:, :, None] * own_v[:, n, None]
            outputs.append(((own_q[:, n] * turn)[:, :, None] * S).sum(1).real / math.sqrt(key))
        o = torch.stack(outputs, 1)
        rows.append((o - o.mean(-1, keepdim=True)) / torch.sqrt(o.var(-1, unbiased=False, keepdim=True) + 1e-5))
    normed = torch.cat(rows, -1) * mixer.norm.weight + mixer.norm.bias
    return (F.silu(gate) * normed) @ mixer.out_proj.weight.T


def made() -> Retention:
    torch.manual_seed(0)
    mixer = Retention(12, n_heads=3, chunk_size=4).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def test_equals_the_papers_recurrence_in_float64() -> None:
    mixer = made()
    x = torch.randn(2, 19, 12, dtype=torch.float64, requires_grad=True)
    expected, actual = written_out(mixer, x), mixer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    dy, wanted = torch.randn_like(expected), [x, *mixer.parameters()]
    for a, e in zip(torch.autograd.grad(actual, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)


def test_positions_matter_by_their_distance_alone() -> None:
    mixer = made()
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(written_out(mixer, x, 1000), mixer(x), rtol=1e-8, atol=1e-10)
    reversed_keys = mixer(x)[:, -1] - mixer(x[:, [1, 0, *range(2, 9)]])[:, -1]
    assert reversed_keys.abs().max() > 1e-3


def test_many_short_calls_turn_the_state_as_one_long_call_does() -> None:
    torch.manual_seed(1)
    mixer = Retention(12, n_heads=2)
    x, state, parts = torch.randn(1, 3000, 12), None, []
    with torch.no_grad():
        for part in x.split(250, dim=1):
            y, state = mixer(part, state=state, return_state=True)
            parts.append(y)
        exact = mixer.double()(x.double())
    assert (torch.cat(parts, 1) - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 5}, "n_heads 5 does not divide d_model 12. Set n_heads to one of 1, 2, 3, 4, 6, 12"),
        ({"n_heads": 0}, "must be positive"),
        ({"expand_v": 0}, "expand_v"),
        ({"n_heads": 12, "expand_v": 1}, "one value each"),
        ({"backend": "fle"}, "retention: there is no backend 'fle'. Did you mean 'fla'?"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Retention(12, **options)
