"""The time-invariant scan: every backend and mode equals the reference, and the reference its closed form."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from agreement import DEVICES, Draw, assert_equals_reference, device_or_skip

from mambaseq.ops import OPS, lti_scan
from mambaseq.ops.dispatch import relative_rms_error
from mambaseq.ops.lti import discretise, discretize
from mambaseq.ops.lti.arguments import LtiArguments

OP = OPS["lti_scan"]
BACKENDS = [backend.name for backend in OP.backends if backend.name != "reference"]


def oscillating(label: str, batch: int, length: int, channels: int, d_state: int, rate: float = 0.03) -> LtiArguments:
    draw = Draw(label)

    def complex_normal(*shape: int) -> torch.Tensor:
        return draw.normal(*shape, dtype=torch.complex64)

    # Frequencies are multiples of 2^-9, so that the powers' phases are exact in float32.
    phase = torch.round(draw.uniform(-3, 3, channels, d_state) * 512) / 512
    return LtiArguments(
        x=draw.normal(batch, length, channels),
        log_decay=torch.complex(-draw.uniform(rate / 3, rate, channels, d_state), phase),
        B=complex_normal(channels, d_state),
        C=complex_normal(channels, d_state),
        initial_state=complex_normal(batch, channels, d_state),
    )


def real(label: str, batch: int, length: int, channels: int, d_state: int) -> LtiArguments:
    made = oscillating(label, batch, length, channels, d_state)
    log_decay, B, C, state = (v.real.clone() for v in made[1:5] if v is not None)
    return made._replace(log_decay=log_decay, B=B, C=C, initial_state=state)


def gated(arguments: LtiArguments) -> LtiArguments:
    draw = Draw("gate")
    return arguments._replace(D=draw.normal(arguments.x.shape[2]), z=draw.normal(*arguments.x.shape))


def packed(arguments: LtiArguments, *bounds: int) -> LtiArguments:
    shape = (len(bounds) - 1, *arguments.B.shape)
    return arguments._replace(
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        initial_state=Draw("states").normal(*shape, dtype=arguments.B.dtype),
    )


CASES: dict[str, Callable[[], LtiArguments]] = {
    "length 1": lambda: oscillating("a", 3, 1, 65, 5),
    "length 2": lambda: oscillating("b", 2, 2, 130, 4),
    "length 63": lambda: oscillating("c", 2, 63, 65, 3),
    "one channel, one state": lambda: oscillating("d", 2, 63, 1, 1),
    "length 1000, reverse": lambda: oscillating("e", 2, 1000, 3, 8)._replace(reverse=True),
    "length 4097, slow decay": lambda: oscillating("f", 1, 4097, 3, 4, rate=3e-3),
    "length 0": lambda: oscillating("g", 2, 0, 3, 4),
    "no state": lambda: oscillating("h", 2, 100, 65, 3)._replace(initial_state=None),
    "D and a gate": lambda: gated(oscillating("m", 2, 100, 66, 16)),
    "D and a gate, real, reverse": lambda: gated(real("n", 2, 100, 64, 16))._replace(reverse=True),
    "64 states, odd width": lambda: oscillating("o", 2, 70, 33, 64),
    "length 3000, a few channels": lambda: gated(oscillating("p", 2, 3000, 8, 16)),
    "real": lambda: real("i", 2, 130, 65, 3),
    "real, reverse": lambda: real("j", 2, 130, 3, 1)._replace(reverse=True),
    "packed": lambda: packed(oscillating("k", 1, 200, 65, 4), 0, 0, 1, 3, 66, 66, 98, 200),
    "packed, reverse, real": lambda: packed(real("l", 1, 200, 5, 4), 0, 63, 64, 200, 200)._replace(reverse=True),
}


@functools.cache
def build(case: str) -> Callable[[], LtiArguments]:
    return functools.cache(CASES[case])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend: str, case: str, device: str) -> None:
    assert_equals_reference(OP, backend, build(case), device_or_skip(device))


def system(kind: str, channels: int = 3, d_state: int = 4) -> dict[str, torch.Tensor]:
    draw = Draw("system")
    dt = draw.uniform(0.01, 0.1, channels).double()
    A = -draw.uniform(0.1, 1, channels, d_state).double()
    B, C = draw.normal(channels, d_state).double(), draw.normal(channels, d_state).double()
    if kind == "complex":
        A = torch.complex(A, draw.uniform(0, 20, channels, d_state).double())
        B = torch.complex(B, draw.normal(channels, d_state).double())
        C = torch.complex(C, draw.normal(channels, d_state).double())
    return {"dt": dt, "A": A, "B": B, "C": C}


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear", "mamba"])
def test_modes_equal_the_kernel_written_out(discretization: str, kind: str) -> None:
    """y = K * x with K_l = (2 Re) C Abar^l Bbar, in NumPy from the textbook's formulas."""
    s = system(kind)
    x = Draw("x").normal(2, 50, 3).double()
    dt, A, B, C = (v.numpy() for v in s.values())
    z = dt[:, None] * A
    Abar, Bbar = {
        "zoh": (np.exp(z), (np.exp(z) - 1) / A * B),
        "bilinear": ((1 + z / 2) / (1 - z / 2), dt[:, None] / (1 - z / 2) * B),
        "mamba": (np.exp(z), dt[:, None] * B),
    }[discretization]
    kernel = np.stack([(C * Abar**k * Bbar).sum(-1) for k in range(50)])
    kernel = 2 * kernel.real if kind == "complex" else kernel
    expected = np.zeros((2, 50, 3))
    for t in range(50):
        expected[:, t] = (kernel[t::-1] * x.numpy()[:, : t + 1]).sum(1)
    for options in ({"mode": "fft"}, {"mode": "scan"}, {"backend": "reference"}):
        y, _ = lti_scan(x, **s, discretization=discretization, **options)
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear", "mamba"])
def test_fft_equals_scan_with_gradients(discretization: str, kind: str) -> None:
    s = system(kind)
    draw = Draw("fft")
    leaves = {
        "x": draw.normal(2, 777, 3).double(),
        **s,
        "D": draw.normal(3).double(),
        "z": draw.normal(2, 777, 3).double(),
        "initial_state": draw.normal(2, 3, 4).to(s["A"].dtype),
    }
    for value in leaves.values():
        value.requires_grad_()
    dy = draw.normal(2, 777, 3).double()
    results = []
    for mode in ("fft", "scan"):
        y, final = lti_scan(**leaves, discretization=discretization, mode=mode)
        loss = (y * dy).sum() + (final.abs() ** 2).sum()
        results.append([y, final, *torch.autograd.grad(loss, leaves.values())])
    for fft, scan in zip(*results, strict=True):
        torch.testing.assert_close(fft, scan, rtol=1e-8, atol=1e-9)


def test_gradcheck_of_discretization() -> None:
    s = system("complex", 2, 2)
    for rule in ("zoh", "bilinear", "mamba"):
        run = functools.partial(discretize, discretization=rule)
        assert torch.autograd.gradcheck(run, [s[name].requires_grad_() for name in ("dt", "A", "B")])


def test_zero_order_hold_of_an_integrator() -> None:
    """A = 0: Bbar is dt B, and its gradient is finite."""
    A = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    _, Bbar = discretize(torch.tensor([0.5], dtype=torch.float64), A, torch.ones(1, 1, dtype=torch.float64))
    assert Bbar.item() == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(Bbar, A)
    assert gradient.item() == pytest.approx(0.5**2 / 2)


@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_bilinear_decay_may_be_negative(mode: str) -> None:
    """Real A with dt A = -6: Abar = -1/2, so the states alternate in sign."""
    x = torch.zeros(1, 4, 1)
    x[0, 0] = 1.0
    one = torch.ones(1, 1)
    y, final = lti_scan(x, torch.tensor([6.0]), -one, one, one, discretization="bilinear", mode=mode)
    expected = 1.5 * torch.tensor([1.0, -0.5, 0.25, -0.125])
    torch.testing.assert_close(y.flatten(), expected)
    torch.testing.assert_close(final, expected[-1:].view(1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_half_precision(mode: str, dtype: torch.dtype) -> None:
    s = {name: v.to(torch.complex64 if v.is_complex() else torch.float32) for name, v in system("complex").items()}
    x = Draw("half").normal(2, 100, 3).to(dtype)
    y, _ = lti_scan(x, **s, mode=mode)
    assert y.dtype == dtype
    torch.testing.assert_close(y, lti_scan(x.float(), **s, backend="reference")[0].to(dtype), rtol=1e-2, atol=1e-3)


def test_autocast_does_not_reach_the_powers() -> None:
    s = {name: v.to(torch.complex64) if v.is_complex() else v.float() for name, v in system("complex").items()}
    x = Draw("autocast").normal(1, 300, 3)
    y, _ = lti_scan(x, **s, mode="fft")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lti_scan(x, **s, mode="fft")[0], y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, "x must be"),
        ({"dt": torch.zeros(2)}, "dt must be"),
        ({"B": torch.zeros(3, 3)}, "B must have the shape of A"),
        ({"C": torch.zeros(3, 2, dtype=torch.complex64)}, "C is complex but A is real"),
        ({"initial_state": torch.zeros(2, 3, 2)}, "initial_state must be"),
        ({"mode": "both"}, "mode must be"),
        ({"discretization": "euler"}, "discretization must be"),
        ({"mode": "scan", "backend": "fft"}, "'fft' cannot run these arguments: mode is 'scan'"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    given = {"x": torch.zeros(1, 4, 3), "dt": torch.ones(3)} | {k: torch.ones(3, 2) for k in "ABC"}
    with pytest.raises(ValueError, match=message):
        lti_scan(**(given | change))


@pytest.mark.gpu
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("channels", "d_state"), [(1, 1), (70, 16), (5, 40)])
def test_the_zero_order_hold_by_kernels(channels: int, d_state: int, is_complex: bool) -> None:
    """Outputs and gradients from float64, for steps from nothing to many turns."""
    device = device_or_skip("cuda")
    draw = Draw(f"hold {channels}")
    parameters = [
        draw.uniform(-12, 0, channels),
        draw.normal(channels, d_state),
        *([draw.uniform(-60, 60, channels, d_state)] if is_complex else []),
        draw.normal(channels, d_state),
    ]
    dtype = torch.complex64 if is_complex else torch.float32
    cotangents = [draw.normal(channels, d_state, dtype=dtype).to(device) for _ in range(2)]
    found = []
    for wide in (False, True):
        leaves = [(v.double() if wide else v).to(device).requires_grad_() for v in parameters]
        log_dt, A_log, *imaginary, B = leaves
        if wide:
            A = -torch.exp(A_log)
            A = torch.complex(A, imaginary[0]) if is_complex else A
            log_decay, b = discretize(torch.exp(log_dt), A, B.to(A.dtype))
            outputs = [torch.exp(log_decay), b]
            dy = [v.to(b.dtype) for v in cotangents]
        else:
            outputs = list(discretise.zero_order_hold(log_dt, A_log, imaginary[0] if is_complex else None, B))
            dy = cotangents
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, dy)])
    for actual, expected in zip(*found, strict=True):
        assert relative_rms_error(actual, expected) <= 1e-5
