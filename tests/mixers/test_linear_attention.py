"""Linear attention against the sums of arXiv:2006.16236 and arXiv:2104.09864, written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mambaseq.errors import ConfigError
from mambaseq.mixers.linear_attention import LinearAttention, LinearAttentionState

ROPE = pytest.mark.parametrize("rope", [True, False])


def phi(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def written_out(mixer: LinearAttention, x: Tensor, rope: bool) -> Tensor:
    """V'_i = Σ_{j≤i} w_ij V_j / Σ_{j≤i} φ(Q_i)ᵀφ(K_j), with w_ij = φ(Q_i)ᵀφ(K_j) (arXiv:2006.16236, equation 9) or
    (R_i φ(Q_i))ᵀ(R_j φ(K_j)) (arXiv:2104.09864, equation 19), the pairs of a head as complex numbers."""
    (batch, length, d_model), heads = x.shape, mixer.n_heads
    q, k, v = ((x @ weight.T).view(batch, length, heads, -1) for weight in mixer.qkv_proj.weight.split(d_model))
    q, k, pairs = phi(q), phi(k), d_model // heads // 2
    seen = torch.ones(length, length, dtype=torch.float64).tril()
    plain = weights = torch.einsum("bihn,bjhn->bhij", q, k) * seen
    if rope:
        theta = torch.tensor([10000.0 ** (-i / pairs) for i in range(pairs)], dtype=torch.float64)
        angle = torch.arange(length, dtype=torch.float64)[:, None, None] * theta
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.complex(M[..., :pairs], M[..., pairs:]) * turn for M in (q, k))
        weights = torch.einsum("bihn,bjhn->bhij", q, k.conj()).real * seen
    y = torch.einsum("bhij,bjhp->bihp", weights / plain.sum(-1, keepdim=True), v)
    return y.reshape(x.shape) @ mixer.out_proj.weight.T


def made(rope: bool) -> LinearAttention:
    torch.manual_seed(0)
    return LinearAttention(12, n_heads=2 if rope else 3, chunk_size=4, rope=rope).double()


def assert_equal_with_gradients(actual: Tensor, expected: Tensor, wanted: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    dy = torch.randn_like(expected)
    for a, e in zip(torch.autograd.grad(actual, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)


def in_pieces(mixer: LinearAttention, x: Tensor) -> Tensor:
    state, parts = None, []
    for part in x.split((7, 1, 11), dim=1):
        y, state = mixer(part, state=state, return_state=True)
        parts.append(y)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("run", [lambda mixer, x: mixer(x), in_pieces], ids=["whole", "in pieces"])
@ROPE
def test_equals_the_papers_sums_in_float64(rope: bool, run) -> None:
    mixer = made(rope)
    x = torch.randn(2, 19, 12, dtype=torch.float64, requires_grad=True)
    expected, actual = written_out(mixer, x, rope), run(mixer, x)
    assert_equal_with_gradients(actual, expected, [x, *mixer.parameters()])


@ROPE
def test_packed_sequences_equal_the_papers_sums_from_their_states_on(rope: bool) -> None:
    mixer = made(rope)
    x = torch.randn(2, 19, 12, dtype=torch.float64, requires_grad=True)
    # of the first sequence 5 and then 14 positions, of the second 10 and then 9
    first = torch.cat([x[:1, :5], x[1:, :10]], 1)
    second = torch.cat([x[:1, 5:], x[1:, 10:]], 1)
    y, state = mixer(first, cu_seqlens=torch.tensor([0, 5, 15], dtype=torch.int32), return_state=True)
    more, state = mixer(second, state, torch.tensor([0, 14, 23], dtype=torch.int32), return_state=True)
    assert state.length.tolist() == [19, 19]
    actual = torch.cat([y[:, :5], more[:, :14], y[:, 5:], more[:, 14:]], 1).view(2, 19, 12)
    expected = written_out(mixer, x, rope)
    assert_equal_with_gradients(actual, expected, [x, *mixer.parameters()])


@ROPE
def test_steps_equal_the_papers_sums(rope: bool) -> None:
    mixer = made(rope)
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    state = mixer.init_state(2).map(lambda t: t.double() if t.is_floating_point() else t)
    y = torch.cat([mixer.step_(x[:, t : t + 1], state) for t in range(19)], 1)
    torch.testing.assert_close(y, written_out(mixer, x, rope), rtol=1e-9, atol=1e-11)


def test_positions_matter_by_their_distance_alone_however_far_away() -> None:
    torch.manual_seed(0)
    mixer = LinearAttention(12, n_heads=2)
    x = torch.randn(2, 19, 12)
    far = mixer.init_state(2)
    far.length += torch.tensor([1_000_000, 3])
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, state=far), mixer(x), rtol=1e-4, atol=1e-6)
        other_order = mixer(x[:, [1, 0, *range(2, 19)]])
    assert (mixer(x) - other_order)[:, -1].abs().max() > 1e-3


def test_a_constant_is_its_own_mean_in_bfloat16_too() -> None:
    """The weights' sums are not rounded to the dtype of the parameters."""
    mixer = LinearAttention(8, n_heads=2, rope=False).bfloat16()
    x = torch.randn(1, 1, 8).bfloat16().expand(1, 500, 8)
    y = mixer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y[:, 1:], y[:, :1].expand(1, 499, 8), rtol=1e-2, atol=1e-2)


def test_turned_sums_are_not_rounded_either() -> None:
    torch.manual_seed(0)
    mixer = LinearAttention(16, n_heads=2).bfloat16()
    x = torch.randn(2, 300, 16).bfloat16()
    exact = copy.deepcopy(mixer).double()(x.double())
    error = (mixer(x).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 1e-2


def test_a_state_without_the_number_of_positions_is_refused() -> None:
    mixer = LinearAttention(12)
    kv = mixer.init_state(2).kv
    with pytest.raises(ValueError, match=r"state\.length .* is needed"):
        mixer(torch.randn(2, 5, 12), state=LinearAttentionState(torch.zeros(1, dtype=torch.int64), kv))


@pytest.mark.parametrize(("d_model", "rope", "n_heads"), [(48, True, 4), (12, True, 2), (6, True, 1), (12, False, 4)])
def test_heads_by_default_are_even_where_they_are_turned(d_model: int, rope: bool, n_heads: int) -> None:
    assert LinearAttention(d_model, rope=rope).n_heads == n_heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 5}, "n_heads 5 does not divide d_model 12. Set n_heads to one of"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_heads": 4}, "head_dim is odd, 3; set n_heads or d_model .* or rope: false"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"backend": "fle"}, "linear_attention: there is no backend 'fle'. Did you mean 'fla'?"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinearAttention(12, **options)
