"""One step at a time equals the whole sequence."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import Draw, relative_rms_error
from torch import Tensor

from mambaseq.ops import causal_conv, lti_scan, selective_scan
from mambaseq.ops.decoding import step

# From the whole sequence in float64; half-precision inputs are rounded alike for both.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-3}
DTYPES = list(TOLERANCE)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert relative_rms_error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "d_state", "groups"), [(65, 16, None), (6, 19, 2), (1, 1, None), (5, 40, 1)])
def test_selective_state_update(channels: int, d_state: int, groups: int | None, dtype: torch.dtype) -> None:
    draw = Draw(f"step {channels}")
    x, dt, z = (draw.normal(3, 20, channels).to(dtype) for _ in range(3))
    B, C = (draw.normal(3, 20, *(() if groups is None else (groups,)), d_state).to(dtype) for _ in range(2))
    A, D, bias = -draw.uniform(0.1, 5, channels, d_state), draw.normal(channels), draw.normal(channels) - 3
    state = draw.normal(3, channels, d_state)
    if dtype == torch.float64:
        state = state.double()
    expected, expected_state = selective_scan(
        *(v.double() for v in (x, dt, A, B, C)),
        D=D.double(),
        z=z.double(),
        dt_bias=bias.double(),
        dt_softplus=True,
        initial_state=state.double(),
        backend="reference",
    )
    ys = [
        step.selective_state_update_(
            state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D=D, z=z[:, t], dt_bias=bias, dt_softplus=True
        )
        for t in range(20)
    ]
    assert ys[0].dtype == dtype
    close(torch.stack(ys, 1), expected, dtype)
    close(state, expected_state, dtype)


def test_a_small_input_after_a_large_one() -> None:
    state, one = torch.zeros(1, 1, 1), torch.ones(1, 1)
    ys = [
        step.selective_state_update_(state, torch.full((1, 1), v), 20 * one, -one, one, one).item() for v in (1e5, 1e-3)
    ]
    assert ys[1] == pytest.approx(20e-3 + 20e5 * math.exp(-20), rel=1e-5)


def test_selective_state_update_bare() -> None:
    draw = Draw("bare")
    x, dt, B, C = draw.normal(2, 5), draw.uniform(0, 1, 2, 5), draw.normal(2, 3), draw.normal(2, 3)
    A, state = -draw.uniform(0, 1, 5, 3), torch.zeros(2, 5, 3)
    y = step.selective_state_update_(state, x, dt, A, B, C)
    torch.testing.assert_close(state, (dt * x)[..., None] * B[:, None])
    torch.testing.assert_close(y, (state * C[:, None]).sum(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "width"), [(65, 4), (3, 1), (2, 2), (5, 7)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv_update(activation: str | None, channels: int, width: int, dtype: torch.dtype) -> None:
    draw = Draw(f"conv {channels}")
    x = draw.normal(3, 20, channels).to(dtype)
    weight, bias = draw.normal(channels, width), draw.normal(channels)
    state = draw.normal(3, channels, width - 1)
    if dtype == torch.float64:
        state = state.double()
    expected, expected_state = causal_conv(
        x.double(),
        weight.double(),
        bias.double(),
        activation=activation,
        initial_state=state.double(),
        backend="reference",
    )
    ys = [step.causal_conv_update_(state, x[:, t], weight, bias, activation=activation) for t in range(20)]
    close(torch.stack(ys, 1), expected, dtype)
    close(state, expected_state, dtype)


@pytest.mark.parametrize("complex_", [True, False])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear", "mamba"])
def test_lti_update(discretization: str, complex_: bool) -> None:
    draw = Draw("lti")
    x, z, D, dt = draw.normal(3, 20, 5), draw.normal(3, 20, 5), draw.normal(5), draw.uniform(0.01, 1, 5)
    A, B, C = -draw.uniform(0.1, 9, 5, 4), draw.normal(5, 4), draw.normal(5, 4)
    state = draw.normal(3, 5, 4)
    if complex_:
        A, state = torch.complex(A, 5 * draw.normal(5, 4)), torch.complex(state, draw.normal(3, 5, 4))
    expected, expected_state = lti_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        initial_state=state,
        discretization=discretization,
        backend="reference",
    )
    state = state.clone()
    ys = [
        step.lti_update_(state, x[:, t], dt, A, B, C, D=D, z=z[:, t], discretization=discretization) for t in range(20)
    ]
    torch.testing.assert_close(torch.stack(ys, 1), expected)
    torch.testing.assert_close(state, expected_state)


def test_kernels_are_left_where_gradients_are_wanted() -> None:
    A = (-torch.rand(5, 3)).requires_grad_()
    values = [torch.rand(2, 5), torch.rand(2, 5), A, torch.rand(2, 3), torch.rand(2, 3)]
    y = step.selective_state_update_(torch.rand(2, 5, 3), *values)
    assert torch.autograd.grad(y.sum(), A)[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_logarithm_of_A(dtype: torch.dtype) -> None:
    draw = Draw("log")
    x, dt, B, C = draw.normal(2, 5), draw.uniform(0, 1, 2, 5), draw.normal(2, 3), draw.normal(2, 3)
    A_log, state = draw.normal(5, 3).to(dtype), draw.normal(2, 5, 3)
    expected_state = state.clone()
    expected = step.selective_state_update_(expected_state, x, dt, -torch.exp(A_log.float()), B, C)
    assert torch.equal(step.selective_state_update_(state, x, dt, A_log, B, C, A_is_log=True), expected)
    assert torch.equal(state, expected_state)
