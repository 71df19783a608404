"""The position-wise layer by hand."""

from __future__ import annotations

import pytest
import torch

from mambaseq.errors import ConfigError
from mambaseq.mixers.mlp import MLP


def test_swiglu_and_gelu_by_hand() -> None:
    x = torch.randn(5, dtype=torch.float64)
    mixer = MLP(5, hidden=3).double()
    gate, up = (mixer.in_proj.weight @ x).chunk(2)
    expected = mixer.out_proj.weight @ (gate / (1 + torch.exp(-gate)) * up)
    torch.testing.assert_close(mixer(x[None, None])[0, 0], expected)
    mixer = MLP(5, activation="gelu").double()
    up = mixer.in_proj.weight @ x
    expected = mixer.out_proj.weight @ (up * (1 + torch.erf(up / 2**0.5)) / 2)
    torch.testing.assert_close(mixer(x[None, None])[0, 0], expected)
    mixer.activation = "gelu_tanh"
    near = up / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3)))
    torch.testing.assert_close(mixer(x[None, None])[0, 0], mixer.out_proj.weight @ near)


def test_both_have_about_as_many_weights() -> None:
    assert MLP(12).hidden == 32
    assert MLP(768).hidden == 2048
    assert MLP(100).hidden == 272
    assert MLP(100, activation="gelu").hidden == 400


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="swiglu, gelu or gelu_tanh, not 'relu'"):
        MLP(8, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="hidden must be positive, not 0"):
        MLP(8, hidden=0)


def test_the_inner_width_may_go_with_the_width() -> None:
    assert [MLP(d_model, activation="gelu", expand=3).hidden for d_model in (8, 16)] == [24, 48]
    for options, told in (
        ({"expand": 3, "hidden": 8}, "expand 3 takes the place of hidden 8"),
        ({"expand": 0}, "expand must be positive, not 0"),
    ):
        with pytest.raises(ConfigError, match=told):
            MLP(8, **options)
