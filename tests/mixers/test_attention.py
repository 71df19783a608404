"""Attention against its definition in float64, rotary positions, and the cache."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.errors import ConfigError
from mambaseq.mixers.attention import Attention, turned, turns

OPTIONS = [
    {},
    {"n_heads": 6, "n_kv_heads": 2, "bias": True},
    {"n_heads": 3, "n_kv_heads": 1, "head_dim": 8, "rope_theta": 50.0, "window": 5},
    {"n_heads": 2, "rope": False, "window": 1},
]


def by_definition(mixer: Attention, x: Tensor) -> Tensor:
    """A position and a head at a time; pairs of features turned as complex numbers."""
    heads, shared, width = mixer.n_heads, mixer.n_kv_heads, mixer.head_dim
    projected = F.linear(x, mixer.in_proj.weight, mixer.in_proj.bias).unflatten(-1, (-1, width))

    def turn(row: Tensor, t: int) -> Tensor:
        if not mixer.rope:
            return row
        number = torch.complex(row[: width // 2], row[width // 2 :])
        angles = [t * mixer.rope_theta ** (-2 * i / width) for i in range(width // 2)]
        number = number * torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=number.dtype)
        return torch.cat([number.real, number.imag])

    batches = []
    for row in projected:
        outputs = []
        for t in range(len(row)):
            first = 0 if mixer.window is None else max(0, t - mixer.window + 1)
            for head in range(heads):
                key = heads + head // (heads // shared)
                q = turn(row[t, head], t)
                scores = torch.stack([q @ turn(row[s, key], s) for s in range(first, t + 1)]) / math.sqrt(width)
                weights = torch.exp(scores) / torch.exp(scores).sum()
                outputs.append(weights @ row[first : t + 1, key + shared])
        batches.append(torch.cat(outputs).view(len(row), heads * width))
    return F.linear(torch.stack(batches), mixer.out_proj.weight, mixer.out_proj.bias)


@pytest.mark.parametrize("options", OPTIONS)
def test_it_equals_its_definition(options: dict) -> None:
    mixer = Attention(12, **options).double()
    x = torch.randn(2, 11, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    y, expected = mixer(x), by_definition(mixer, x)
    torch.testing.assert_close(y, expected)
    inputs = [x, *mixer.parameters()]
    for one, other in zip(
        torch.autograd.grad((y * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_queries_and_keys_are_normed() -> None:
    mixer = Attention(12, n_heads=2, qk_norm=True)
    plain = Attention(12, n_heads=2)
    plain.load_state_dict(mixer.state_dict(), strict=False)
    with torch.no_grad():
        assert mixer.q_norm is not None
        mixer.q_norm.weight.mul_(3)
        for loud in (mixer.in_proj, plain.in_proj):
            loud.weight.mul_(5)
        x = torch.randn(1, 6, 12)
        q, k, _ = plain._project(x, torch.zeros(1, 6))
        normed_q, normed_k, _ = mixer._project(x, torch.zeros(1, 6))
    torch.testing.assert_close(normed_q, 3 * q / q.square().mean(-1, keepdim=True).sqrt(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normed_k, k / k.square().mean(-1, keepdim=True).sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", [1000, 3_000_000])
def test_rotary_positions_are_relative(start: int) -> None:
    q, k = torch.randn(1, 8), torch.randn(1, 8)

    def product(at: int) -> Tensor:
        """q, three positions after k."""
        return (
            turned(q, *turns(torch.tensor(at + 3), 8, 1e4, q.dtype))
            * turned(k, *turns(torch.tensor(at), 8, 1e4, k.dtype))
        ).sum()

    torch.testing.assert_close(product(start), product(0), rtol=0, atol=1e-5)
    assert (product(0) - (q * k).sum()).abs() > 1e-2


def test_steps_write_where_there_is_room() -> None:
    mixer = Attention(12, n_heads=2)
    x = torch.randn(2, 40, 12)
    with torch.no_grad():
        expected = mixer(x)
        state = mixer.init_state(2, max_length=40)
        k, length = state.k, state.length
        ys = [mixer.step_(x[:, t : t + 1], state) for t in range(40)]
        torch.testing.assert_close(torch.cat(ys, 1), expected)
        assert state.k is k
        assert state.length is length
        growing = mixer.init_state(2)
        capacities = []
        for t in range(40):
            mixer.step_(x[:, t : t + 1], growing)
            capacities.append(growing.capacity)
    assert capacities == [16] * 16 + [32] * 16 + [64] * 8


@pytest.mark.parametrize("window", [None, 4])
def test_sequences_of_different_lengths_go_on_together(window: int | None) -> None:
    mixer = Attention(12, n_heads=2, window=window)
    x, more = torch.randn(1, 13, 12), torch.randn(3, 20, 12)
    bounds = torch.tensor([0, 3, 3, 13], dtype=torch.int32)
    with torch.no_grad():
        _, state = mixer(x, cu_seqlens=bounds, return_state=True)
        given = copy.deepcopy(state)
        ys, state = mixer(more[:, :2], state=state, return_state=True)
        ys = torch.cat([ys, *(mixer.step_(more[:, t : t + 1], state) for t in range(2, 20))], 1)
        for i, past in enumerate((x[:, :3], x[:, 3:3], x[:, 3:])):
            whole = mixer(torch.cat([past, more[i : i + 1]], 1))
            torch.testing.assert_close(ys[i : i + 1], whole[:, past.shape[1] :])
    assert state.length.tolist() == [23, 20, 30]
    assert given.length.tolist() == [3, 0, 10]


def test_a_cache_that_was_made_with_room_is_filled_by_a_prompt() -> None:
    mixer = Attention(12, n_heads=2).to(torch.bfloat16)
    x = torch.randn(2, 9, 12, dtype=torch.bfloat16)
    with torch.no_grad():
        y, state = mixer(x, state=mixer.init_state(2, max_length=50), return_state=True)
        assert state.capacity == 50
        assert state.k.dtype == torch.bfloat16
        assert torch.equal(y, mixer(x))
        assert mixer(x[:, :0], state=state).shape == (2, 0, 12)


def test_heads_by_themselves() -> None:
    for d_model, heads, width in ((12, 1, 12), (768, 12, 64), (96, 2, 48), (100, 2, 50)):
        mixer = Attention(d_model)
        assert (mixer.n_heads, mixer.head_dim) == (heads, width)
    assert Attention(96, head_dim=16).n_heads == 6
    assert Attention(7, rope=False).n_heads == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 5}, "12 is not divisible by n_heads 5; take a divisor"),
        ({"head_dim": 8}, "12 is not divisible by head_dim 8; take a divisor"),
        ({"n_heads": 6, "n_kv_heads": 4}, "6 is not a multiple of 4; take a divisor of 6"),
        ({"n_heads": 4}, "head_dim 3 is odd; set n_heads or head_dim"),
        ({"n_heads": 0}, "n_heads must be positive, not 0"),
        ({"window": 0}, "window must be positive, not 0"),
        ({"rope_theta": -1.0}, "rope_theta must be positive"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Attention(12, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("options", [{}, {"n_heads": 4, "n_kv_heads": 2}])
def test_half_precision_on_a_gpu(cuda: torch.device, options: dict, window: int | None) -> None:
    """Packed and windowed calls take kernels of their own there."""
    mixer = Attention(64, window=window, **options).to(cuda)
    half = copy.deepcopy(mixer).to(torch.bfloat16)
    x, dy = torch.randn(1, 300, 64, device=cuda), torch.randn(1, 300, 64, device=cuda)
    bounds = torch.tensor([0, 1, 1, 200, 300], dtype=torch.int32, device=cuda)
    for cu_seqlens in (None, bounds):
        results = []
        for run in (mixer, half):
            inputs = [x.to(run.out_proj.weight.dtype).requires_grad_(), *run.parameters()]
            y = run(inputs[0], cu_seqlens=cu_seqlens)
            results.append([y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))])
        for one, other in zip(*results, strict=True):
            assert (one - other.float()).norm() <= 2e-2 * one.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_captured_where_there_is_room(cuda: torch.device, dtype: torch.dtype) -> None:
    mixer = Attention(64, n_heads=4, n_kv_heads=2).to(cuda, dtype)
    x = torch.randn(3, 12, 64, device=cuda, dtype=dtype)
    state, replayed = mixer.init_state(3, max_length=12), mixer.init_state(3, max_length=12)
    expected = torch.cat([mixer.step_(x[:, t : t + 1], state) for t in range(12)], 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ys = [mixer.step_(x[:, :1], replayed)]
    torch.cuda.current_stream().wait_stream(stream)
    graph, token = torch.cuda.CUDAGraph(), x[:, 1:2].clone()
    with torch.cuda.graph(graph):
        y = mixer.step_(token, replayed)
    for t in range(1, 12):
        token.copy_(x[:, t : t + 1])
        graph.replay()
        ys.append(y.clone())
    torch.testing.assert_close(torch.cat(ys, 1), expected)
    assert replayed.length.tolist() == [12] * 3
