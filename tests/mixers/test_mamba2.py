"""Mamba-2: names, initial values and the recurrence of the paper, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mambaseq.errors import ConfigError
from mambaseq.mixers.mamba2 import Mamba2
from mambaseq.models import causal_lm


def test_names_and_shapes_are_those_of_the_published_checkpoints() -> None:
    """state-spaces/mamba2-130m, layer 0."""
    shapes = {name: tuple(p.shape) for name, p in Mamba2(768).named_parameters()}
    assert shapes == {
        "dt_bias": (24,),
        "A_log": (24,),
        "D": (24,),
        "in_proj.weight": (3352, 768),
        "conv1d.weight": (1792, 1, 4),
        "conv1d.bias": (1792,),
        "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }


def test_initial_values_survive_model_building() -> None:
    model = causal_lm(11, 96, 5, mixer="mamba2", head_dim=4, dt_min=0.01, dt_max=0.05, A_init_range=[2.0, 8.0])
    for layer in model.backbone.layers:
        mixer = layer.mixer
        dt, A = F.softplus(mixer.dt_bias), torch.exp(mixer.A_log)
        assert 0.0099 < dt.min() < 0.015
        assert 0.035 < dt.max() < 0.0501
        assert 1.999 < A.min() < 4
        assert 6 < A.max() < 8.001
        assert torch.equal(mixer.D, torch.ones(48))
        assert torch.equal(mixer.norm.weight, torch.ones(192))


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_equals_the_papers_recurrence_in_float64(norm_before_gate: bool) -> None:
    torch.manual_seed(0)
    options = {"d_state": 3, "d_conv": 3, "head_dim": 4, "n_groups": 2, "norm_before_gate": norm_before_gate}
    mixer = Mamba2(8, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in mixer.parameters():  # nothing may hide behind an initial value
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    heads, head_dim, groups, d_state, d_inner = 4, 4, 2, 3, 16

    def written_out() -> torch.Tensor:
        conv, state, outputs = [torch.zeros(2, 28).double()] * 2, torch.zeros(2, heads, head_dim, d_state).double(), []
        for t in range(11):
            projected = x[:, t] @ mixer.in_proj.weight.T
            z, xBC, dt = projected[:, :16], projected[:, 16:44], projected[:, 44:]
            conv = [*conv[-2:], xBC]
            xBC = F.silu(sum(conv[k] * mixer.conv1d.weight[:, 0, k] for k in range(3)) + mixer.conv1d.bias)
            u = xBC[:, :16].view(2, heads, head_dim)
            B, C = (M.reshape(2, groups, d_state) for M in (xBC[:, 16:22], xBC[:, 22:]))
            delta = F.softplus(dt + mixer.dt_bias)
            y = []
            for h in range(heads):
                group = h // (heads // groups)
                decay = torch.exp(-delta[:, h] * mixer.A_log[h].exp())[:, None, None]
                added = (delta[:, h, None] * u[:, h])[:, :, None] * B[:, group, None]
                state = torch.cat([state[:, :h], (decay * state[:, h] + added)[:, None], state[:, h + 1 :]], 1)
                y.append((state[:, h] * C[:, group, None]).sum(-1) + mixer.D[h] * u[:, h])
            gated = torch.cat(y, 1) * (1 if norm_before_gate else F.silu(z))
            rows = gated.view(2, groups, -1)
            rows = rows / torch.sqrt((rows**2).mean(-1, keepdim=True) + 1e-5)
            normed = rows.reshape(2, d_inner) * mixer.norm.weight
            outputs.append((normed * F.silu(z) if norm_before_gate else normed) @ mixer.out_proj.weight.T)
        return torch.stack(outputs, 1)

    expected, actual = written_out(), mixer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    dy, wanted = torch.randn_like(expected), [x, *mixer.parameters()]
    for a, e in zip(torch.autograd.grad(actual, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("d_model", [12, 64, 100, 67])
def test_the_size_of_heads_fits_the_width(d_model: int) -> None:
    mixer = Mamba2(d_model, d_state=4)
    assert mixer.n_heads * mixer.head_dim == 2 * d_model
    assert mixer.head_dim == {12: 24, 64: 64, 100: 50, 67: 2}[d_model]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state must be positive"),
        ({"head_dim": 5}, "head_dim 5 does not divide expand \\* d_model = 16"),
        ({"head_dim": 4, "n_groups": 3}, "n_groups 3 does not divide the 4 heads"),
        ({"dt_min": 0.2}, "dt_min must be above 0 and at most dt_max"),
        ({"dt_init_floor": 0.0}, "dt_init_floor"),
        ({"A_init_range": (0.0, 1.0)}, "A_init_range"),
        ({"backend": "trition"}, "no backend 'trition'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mamba2(8, **options)
