"""Linear attention against the sums of arXiv:2006.16236, written out."""

from __future__ import annotations

import pytest
import torch

from mambaseq.errors import ConfigError
from mambaseq.mixers.linear_attention import LinearAttention


def phi(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def test_equals_the_papers_sums_in_float64() -> None:
    """Equation 9: V'_i = Σ_{j≤i} φ(Q_i)ᵀφ(K_j) V_j / Σ_{j≤i} φ(Q_i)ᵀφ(K_j)."""
    torch.manual_seed(0)
    mixer = LinearAttention(12, n_heads=3, chunk_size=4).double()
    x = torch.randn(2, 19, 12, dtype=torch.float64, requires_grad=True)
    q, k, v = (x @ weight.T for weight in mixer.qkv_proj.weight.split(12))
    outputs = []
    for i in range(19):
        heads = []
        for head in range(3):
            own = slice(4 * head, 4 * head + 4)
            weights = [(phi(q[:, i, own]) * phi(k[:, j, own])).sum(-1, keepdim=True) for j in range(i + 1)]
            heads.append(sum(w * v[:, j, own] for j, w in enumerate(weights)) / sum(weights))
        outputs.append(torch.cat(heads, -1) @ mixer.out_proj.weight.T)
    expected, actual = torch.stack(outputs, 1), mixer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    dy, wanted = torch.randn_like(expected), [x, *mixer.parameters()]
    for a, e in zip(torch.autograd.grad(actual, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)


def test_a_constant_is_its_own_mean_in_bfloat16_too() -> None:
    """The weights' sums are not rounded to the dtype of the parameters."""
    mixer = LinearAttention(8, n_heads=2).bfloat16()
    x = torch.randn(1, 1, 8).bfloat16().expand(1, 500, 8)
    y = mixer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y[:, 1:], y[:, :1].expand(1, 499, 8), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("n_heads", [0, 5])
def test_heads_that_do_not_divide_are_refused(n_heads: int) -> None:
    with pytest.raises(ConfigError, match="n_heads"):
        LinearAttention(12, n_heads=n_heads)
