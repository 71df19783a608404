"""Hyena against a direct sum in float64, its filters, and what a state keeps of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.errors import ConfigError
from mambaseq.mixers.hyena import Hyena
from mambaseq.tasks.optimizer import parameter_groups


def tap(mixer: Hyena, lag: int) -> Tensor:
    """The filters at one lag, `(order - 1, d_model)`, feature by feature and layer by layer."""
    made = mixer.filter
    n_bands = (made.emb_dim - 1) // 2
    # linspace(1e-4, n_bands - 1, n_bands)
    bands = [1e-4 + i * (n_bands - 1 - 1e-4) / max(n_bands - 1, 1) for i in range(n_bands)]
    angles = [2 * math.pi * band * lag / made.l_max for band in bands]
    time = lag / (made.l_max - 1)
    h = torch.tensor([time, *map(math.cos, angles), *(-math.sin(a) for a in angles)], dtype=torch.float64)
    for layer in made.layers:
        h = torch.sin(made.frequency * (layer.weight @ h + layer.bias))
    channels = (mixer.order - 1) * mixer.d_model
    slow, fast = math.log(100) / made.slow_decay, math.log(100) / made.fast_decay
    rates = [slow + c * (fast - slow) / (channels - 1) for c in range(channels)]
    window = torch.tensor([math.exp(-time * rate) for rate in rates], dtype=torch.float64) + made.shift
    return (made.last.weight @ h * window).view(mixer.order - 1, mixer.d_model)


def by_definition(mixer: Hyena, x: Tensor) -> Tensor:
    """A position at a time."""
    projected = F.linear(x, mixer.in_proj.weight, mixer.in_proj.bias)
    width, length = mixer.short_conv, x.shape[1]
    short = mixer.conv1d.weight[:, 0]
    rows = []
    for t in range(length):
        terms = [short[:, width - 1 - lag] * projected[:, t - lag] for lag in range(min(width, t + 1))]
        rows.append(torch.stack(terms).sum(0) + mixer.conv1d.bias)
    *x_, v = torch.stack(rows, 1).split(mixer.d_model, dim=-1)
    taps = [tap(mixer, lag) for lag in range(length)]
    for i in range(mixer.order - 1):
        u = v * x_[mixer.order - 1 - i]
        sums = [torch.stack([taps[t - s][i] * u[:, s] for s in range(t + 1)]).sum(0) for t in range(length)]
        v = torch.stack(sums, 1) + mixer.D[i] * u
    return F.linear(v * x_[0], mixer.out_proj.weight, mixer.out_proj.bias)


@pytest.mark.parametrize(
    "options", [{"l_max": 16}, {"order": 3, "l_max": 9, "short_conv": 1, "emb_dim": 3, "bias": False}]
)
def test_it_equals_the_direct_sum(options: dict) -> None:
    mixer = Hyena(6, filter_order=8, **options).double()
    x = torch.randn(2, 14, 6, dtype=torch.float64, requires_grad=True)
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


def test_filters_are_of_the_lag_alone_and_fade() -> None:
    filters = Hyena(32, l_max=100, shift=0.0).filter
    with torch.no_grad():
        torch.testing.assert_close(filters(300)[:50], filters(50))
        size = filters(300).abs().amax(0)
        # behind l_max the slowest window is below 1e-2 ** (1 / 1.5), the fastest below 1e-2 ** (1 / 0.3)
        assert (filters(300)[100:].abs().amax(0)[-1] / size[-1]) < 1e-4
        assert (filters(300)[100:].abs().amax(0) / size).max() < 0.5


def test_steps_make_filters_once_and_anew_for_other_weights() -> None:
    mixer = Hyena(6, l_max=16)
    x = torch.randn(2, 20, 6)
    with torch.no_grad():
        state = mixer.init_state(2, max_length=20)
        history = state.history
        for t in range(5):
            mixer.step_(x[:, t : t + 1], state)
        taps, fork = state.taps, state.select(torch.tensor([1]))
        mixer.step_(x[:, 5:6], state)
        assert state.taps is taps
        assert fork.taps is taps
        assert state.history is history
        mixer.filter.last.weight.mul_(2)
        y = mixer.step_(x[1:, 5:6], fork)
        assert fork.taps is not taps
        expected, _ = mixer(x[1:, 5:6], state=mixer(x[1:, :5], return_state=True)[1], return_state=True)
        torch.testing.assert_close(y, expected)


def test_sequences_of_different_lengths_go_on_together() -> None:
    mixer = Hyena(6, order=3, l_max=16)
    x, more = torch.randn(1, 13, 6), torch.randn(3, 20, 6)
    with torch.no_grad():
        _, state = mixer(x, cu_seqlens=torch.tensor([0, 3, 3, 13], dtype=torch.int32), return_state=True)
        ys, state = mixer(more[:, :2], state=state, return_state=True)
        ys = torch.cat([ys, *(mixer.step_(more[:, t : t + 1], state) for t in range(2, 20))], 1)
        for i, past in enumerate((x[:, :3], x[:, 3:3], x[:, 3:])):
            whole = mixer(torch.cat([past, more[i : i + 1]], 1))
            torch.testing.assert_close(ys[i : i + 1], whole[:, past.shape[1] :])
        assert mixer(more[:, :0], state=state).shape == (3, 0, 6)


def test_learned_positions_begin_at_the_fixed_ones_and_end_at_l_max() -> None:
    torch.manual_seed(0)
    fixed = Hyena(6, l_max=9)
    torch.manual_seed(0)
    mixer = Hyena(6, l_max=9, positions="learned")
    assert mixer.filter.positions is not None
    with torch.no_grad():
        filters = mixer.filter(20)
        torch.testing.assert_close(filters[:9], fixed.filter(9))
        assert not filters[9:].any()
        mixer.filter.positions[3] += 1
        changed = (mixer.filter(20) - filters).abs().amax(1)
        assert changed[3] > 1e-3
        assert not changed[[0, 1, 2, *range(4, 20)]].any()


@pytest.mark.parametrize("positions", ["fixed", "learned"])
def test_filters_have_no_weight_decay(positions: str) -> None:
    mixer = Hyena(6, l_max=9, positions=positions)
    decays, rest = (set(map(id, group["params"])) for group in parameter_groups(mixer, 0.1))
    assert {id(mixer.in_proj.weight), id(mixer.out_proj.weight), id(mixer.conv1d.weight)} == decays
    assert {id(p) for p in mixer.filter.parameters()} <= rest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 1}, "order must be at least 2, not 1"),
        ({"emb_dim": 4}, "emb_dim must be odd"),
        ({"short_conv": 0}, "short_conv must be positive, not 0"),
        ({"sine_frequency": 0.0}, "sine_frequency must be positive"),
        ({"positions": "none"}, "positions must be fixed or learned, not 'none'"),
        ({"slow_decay": 0.0}, "slow_decay must be positive and finite, not 0.0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hyena(6, **options)
