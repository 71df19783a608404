"""The scan of dense linear systems: blocks of time equal the loop over time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from agreement import DEVICES, Draw, assert_equals_reference, device_or_skip

from mambaseq.ops import OPS, state_space_scan
from mambaseq.ops.dispatch import outputs_and_gradients, relative_rms_error
from mambaseq.ops.state_space.arguments import StateSpaceArguments

OP = OPS["state_space_scan"]


def systems(
    label: str,
    batch: int,
    length: int,
    channels: int,
    d_state: int = 4,
    *,
    count: int | None = None,
    outputs: int = 1,
    dtype: torch.dtype = torch.float32,
) -> StateSpaceArguments:
    """Stable systems, `count` of them (one a channel if None), not normal, with initial states."""
    draw = Draw(label)

    def normal(*shape: int) -> torch.Tensor:
        return draw.normal(*shape, dtype=dtype)

    count = channels if count is None else count
    A = normal(count, d_state, d_state)
    A = A * draw.uniform(0.8, 0.999, count, 1, 1) / torch.linalg.matrix_norm(A, 2)[:, None, None]
    x, state = normal(batch, length, channels), normal(batch, channels, d_state)
    return StateSpaceArguments(x, A, normal(count, d_state), normal(count, outputs, d_state), state)


def packed(arguments: StateSpaceArguments, *bounds: int) -> StateSpaceArguments:
    state = arguments.initial_state
    assert state is not None
    return arguments._replace(
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        initial_state=Draw("states").normal(len(bounds) - 1, *state.shape[1:], dtype=state.dtype),
    )


CASES: dict[str, Callable[[], StateSpaceArguments]] = {
    "length 0": lambda: systems("a", 2, 0, 3),
    "batch 0": lambda: systems("n", 0, 70, 3, outputs=2),
    "length 1": lambda: systems("b", 3, 1, 5),
    "length 2": lambda: systems("c", 2, 2, 3, outputs=2),
    "length 63": lambda: systems("d", 2, 63, 3),
    "length 64, shared by all": lambda: systems("e", 2, 64, 6, count=1, outputs=3),
    "length 500": lambda: systems("f", 2, 500, 3),
    "length 500, shared by some, no state": lambda: systems("g", 2, 500, 6, count=2)._replace(initial_state=None),
    "complex, one state": lambda: systems("h", 2, 150, 5, 1, dtype=torch.complex64),
    "packed": lambda: packed(systems("i", 1, 500, 3), 0, 0, 1, 3, 66, 66, 130, 500, 500),
    "packed, short ones, shared": lambda: packed(systems("j", 1, 20, 4, count=2), 0, 3, 3, 4, 10, 20),
    "packed, all empty": lambda: packed(systems("k", 1, 0, 3), 0, 0, 0),
    "packed, complex, no state": lambda: packed(systems("l", 1, 200, 4, 2, dtype=torch.complex64), 0, 64, 200)._replace(
        initial_state=None
    ),
    "no final state": lambda: systems("m", 2, 100, 3)._replace(wants_final_state=False),
}


@functools.cache
def build(case: str) -> Callable[[], StateSpaceArguments]:
    return functools.cache(CASES[case])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, device: str) -> None:
    assert_equals_reference(OP, "blocks", build(case), device_or_skip(device))


@pytest.mark.parametrize("case", CASES)
def test_equals_reference_in_double_precision(case: str) -> None:
    blocks, reference = (outputs_and_gradients(backend, build(case)(), double=True) for backend in OP.backends)
    for actual, expected in zip(blocks, reference, strict=True):
        assert relative_rms_error(actual, expected) <= 1e-12


def test_a_kernel_written_out() -> None:
    """The response to an impulse is C A^l B, and the last state A^(L-1) B."""
    a = systems("impulse", 1, 100, 3, outputs=2)
    x = torch.zeros(1, 100, 3, dtype=torch.float64)
    x[:, 0] = 1
    y, final = state_space_scan(x, a.A.double(), a.B.double(), a.C.double())
    A, B, C = (value.double().numpy() for value in (a.A, a.B, a.C))
    for c in range(3):
        for step in (0, 1, 63, 64, 99):
            power = np.linalg.matrix_power(A[c], step) @ B[c]
            np.testing.assert_allclose(y[0, step, c].numpy(), C[c] @ power, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(final[0, c].numpy(), power, rtol=1e-10, atol=1e-14)


def test_a_slow_system_keeps_its_digits() -> None:
    """A = 1 - 1e-6 in float64, given in float64: over 4096 steps its float32 would be off by 1e-4."""
    A = torch.full((1, 1, 1), 1 - 1e-6, dtype=torch.float64)
    x = torch.zeros(1, 4096, 1)
    x[:, 0] = 1
    y, _ = state_space_scan(x, A, torch.ones(1, 1))
    expected = (1 - 1e-6) ** torch.arange(4096, dtype=torch.float64)
    torch.testing.assert_close(y.flatten().double(), expected, rtol=1e-6, atol=0)


def test_autocast_does_not_reach_the_states() -> None:
    a = systems("autocast", 1, 200, 3)
    y, _ = state_space_scan(a.x, a.A, a.B, a.C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(state_space_scan(a.x, a.A, a.B, a.C)[0], y)
    low, _ = state_space_scan(a.x.bfloat16(), a.A, a.B, a.C)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3)}, "x must be"),
        ({"A": torch.zeros(2, 2, 2)}, "divisor of the 3 channels"),
        ({"B": torch.zeros(3, 3)}, "B must be"),
        ({"C": torch.zeros(3, 2)}, "C must be"),
        ({"x": torch.zeros(1, 4, 3, dtype=torch.complex64)}, "x is complex but A is real"),
        ({"initial_state": torch.zeros(2, 3, 2)}, "initial_state must be"),
        ({"x": torch.zeros(1, 4, 3, dtype=torch.int64)}, "x must be floating-point"),
        ({"A": torch.ones(3, 2, 2, device="meta")}, "A is on meta"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    given = {"x": torch.zeros(1, 4, 3), "A": torch.ones(3, 2, 2), "B": torch.ones(3, 2), "C": torch.ones(3, 1, 2)}
    with pytest.raises(ValueError, match=message):
        state_space_scan(**(given | change))
