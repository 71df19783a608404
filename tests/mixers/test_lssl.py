"""LSSL against its paper's equations, step by step in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixers.recurrence import assert_same, bilinear, recurrence

from mambaseq.errors import ConfigError
from mambaseq.mixers.hippo import transition
from mambaseq.mixers.lssl import LSSL


@pytest.mark.parametrize("length", [1, 150])
@pytest.mark.parametrize(
    "options",
    [
        {"d_state": 4, "outputs": 2},
        {"d_state": 16, "measure": "legt", "alpha": 1.0},
        {"d_state": 4, "trainable_A": True, "alpha": 0.7},
    ],
)
def test_equals_the_recurrence_with_gradients(options: dict, length: int) -> None:
    torch.manual_seed(0)
    mixer = LSSL(3, **options)
    ssm = mixer.ssm
    x = torch.randn(2, length, 3, dtype=torch.float64)
    A, B = transition(options.get("measure", "legs"), options["d_state"])
    if "trainable_A" in options:
        A, B = ssm.A.double(), ssm.B.double()
    system = bilinear(A.expand(3, -1, -1), B.expand(3, -1), ssm.log_dt.double().exp(), options.get("alpha", 0.5))
    expected, h = recurrence(*system, ssm.C.double(), x)
    expected = expected + ssm.D * x[..., None]
    y, state = ssm(x, return_state=True)
    weight = torch.randn_like(y)
    results = [[value, *torch.autograd.grad((value * weight).sum(), list(ssm.parameters()))] for value in (y, expected)]
    assert_same(results[0][:1], results[1][:1], 1e-10)
    assert_same(results[0][1:], results[1][1:], 1e-6)
    assert_same([state], [h], 1e-10)
    out = mixer(x.float())
    written = F.linear(F.gelu(expected).flatten(2).float(), mixer.out_proj.weight, mixer.out_proj.bias)
    assert_same([out], [written], 2e-6)


def test_fixed_matrices_keep_their_digits_in_a_bfloat16_model() -> None:
    mixer = LSSL(8).bfloat16()
    y, state = mixer(torch.randn(1, 20, 8).bfloat16(), return_state=True)
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert torch.equal(mixer.ssm.A.view(torch.float64), transition("legs", 32)[0])
    assert {name for name, _ in mixer.ssm.named_parameters()} == {"log_dt", "C", "D"}


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="alpha"):
        LSSL(8, alpha=0.2)
    with pytest.raises(ConfigError, match="measure"):
        LSSL(8, measure="lagt")
