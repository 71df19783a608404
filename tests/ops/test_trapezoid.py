"""Mamba-3's recurrence: chunks equal the loop, the loop the rule that it is named after, one step the whole."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from agreement import (
    DEVICES,
    ROWS,
    TOLERANCE,
    Draw,
    assert_equals_reference,
    calls_of,
    device_or_skip,
    errors_by_name,
    moved,
)

from mambaseq.ops import OPS, ssd, trapezoidal_scan
from mambaseq.ops.chunks import sums
from mambaseq.ops.dispatch import outputs_and_gradients, relative_rms_error
from mambaseq.ops.trapezoid import TrapezoidArguments, gpu, step, trapezoidal_update_

OP = OPS["trapezoidal_scan"]
TORCH, TRITON, REFERENCE = (next(b for b in OP.backends if b.name == name) for name in ("torch", "triton", "reference"))
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton's kernels run, interpreted or not


def drawn(label: str, batch: int, length: int, *, rank: int = 1, rate: float = 1.0) -> TrapezoidArguments:
    draw, one = Draw(label), (batch, length, 2)
    return TrapezoidArguments(
        x=draw.normal(*one, rank, 3),
        dt=draw.uniform(0, 1, *one),
        A=-rate * draw.uniform(0, 2, *one),
        trap=draw.uniform(0, 1, *one),
        B=draw.normal(*one, rank, 5),
        C=draw.normal(*one, rank, 5),
        initial_state=draw.normal(batch, 2, 3, 5),
        initial_x=draw.normal(batch, 2, rank, 3),
        initial_B=draw.normal(batch, 2, rank, 5),
        chunk_size=32,
    )


def packed(arguments: TrapezoidArguments, *bounds: int) -> TrapezoidArguments:
    n, rank = len(bounds) - 1, arguments.x.shape[3]
    states = drawn("states", max(1, n), 1, rank=rank)
    return arguments._replace(
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        **{name: getattr(states, name)[:n] for name in ("initial_state", "initial_x", "initial_B")},
    )


CASES: dict[str, Callable[[], TrapezoidArguments]] = {
    "length 0": lambda: drawn("a", 2, 0),
    "length 1, reverse": lambda: drawn("b", 2, 1)._replace(reverse=True),
    "length 100": lambda: drawn("c", 1, 100),
    "rank 3, reverse": lambda: drawn("d", 2, 70, rank=3)._replace(reverse=True),
    "strong decay": lambda: drawn("e", 1, 70, rate=300.0),
    "slow decay, chunks of 1": lambda: drawn("f", 1, 20, rate=1e-3)._replace(chunk_size=1),
    "no states": lambda: drawn("g", 1, 40)._replace(initial_state=None, initial_x=None, initial_B=None),
    "packed, rank 2": lambda: packed(drawn("h", 1, 150, rank=2), 0, 0, 1, 3, 66, 66, 98, 150, 150),
    "packed, reverse": lambda: packed(drawn("i", 1, 100), 0, 63, 64, 100)._replace(reverse=True),
    "packed, length 0": lambda: packed(drawn("j", 1, 0), 0, 0, 0),
    "packed, no sequence": lambda: packed(drawn("k", 1, 0), 0),
    "forgetting all at times": lambda: forgetting(drawn("l", 1, 40)),
}


def forgetting(arguments: TrapezoidArguments) -> TrapezoidArguments:
    """Decays of 0 in between, whose logarithms would take the digits of all others."""
    A = arguments.A.clone()
    A[:, 3::7] = -1e30
    return arguments._replace(A=A)


def sized(label: str, length: int, rank: int, head_dim: int, d_state: int, *bounds: int) -> TrapezoidArguments:
    """As models have them."""
    batch, draw = 1 if bounds else ROWS if length == 1 else 2, Draw(label)
    made, n = drawn(label, batch, length), len(bounds) - 1 if bounds else batch
    one = (batch, length, 2, rank)
    return made._replace(
        x=draw.normal(*one, head_dim),
        B=draw.normal(*one, d_state),
        C=draw.normal(*one, d_state),
        initial_state=draw.normal(n, 2, head_dim, d_state),
        initial_x=draw.normal(n, 2, rank, head_dim),
        initial_B=draw.normal(n, 2, rank, d_state),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32) if bounds else None,
    )


SIZED: dict[str, Callable[[], TrapezoidArguments]] = {
    "64 x 128": lambda: sized("q", 500, 1, 64, 128),
    "64 x 128, rank 4": lambda: sized("r", 500, 4, 64, 128),
    "rank 4, packed": lambda: sized("s", 300, 4, 64, 64, 0, 0, 1, 17, 150, 150, 300),
    "128 x 256, rank 2, reverse": lambda: sized("t", 150, 2, 128, 256)._replace(reverse=True),
    "length 1": lambda: sized("x", 1, 1, 64, 128),
    "length 1, rank 4, reverse": lambda: sized("y", 1, 4, 64, 128)._replace(reverse=True),
    "one position each": lambda: sized("v", 40, 2, 64, 64, *range(41)),
    "forgetting all at times": lambda: forgetting(sized("w", 100, 1, 64, 64)),
    "a long row, in segments": lambda: sized("u", 4000, 1, 32, 32)._replace(wants_final_state=False),
}
CASES = {name: functools.cache(build) for name, build in CASES.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, device: str) -> None:
    assert_equals_reference(OP, "torch", CASES[case], device_or_skip(device))


def test_in_float64_nothing_but_rounding_differs() -> None:
    made = CASES["packed, rank 2"]()
    expected, actual = (outputs_and_gradients(run, made, double=True) for run in (REFERENCE, TORCH))
    assert max(relative_rms_error(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-12


def test_half_precision() -> None:
    @functools.cache
    def halves() -> TrapezoidArguments:
        made = drawn("half", 1, 70, rank=2)
        return made._replace(**{name: getattr(made, name).bfloat16() for name in ("x", "B", "C")})

    assert_equals_reference(OP, "torch", halves, torch.device("cpu"), torch.bfloat16)


def halved(arguments: TrapezoidArguments, dtype: torch.dtype) -> TrapezoidArguments:
    return arguments._replace(**{name: getattr(arguments, name).to(dtype) for name in ("x", "B", "C")})


def assert_kernels_are_near(made: TrapezoidArguments, dtype: torch.dtype, device: torch.device) -> None:
    """Against the chunked form in float64, on the same rounded inputs."""
    for label, error in errors_by_name(TRITON, TORCH, moved(halved(made, dtype), device)).items():
        assert error < TOLERANCE[dtype], f"{label}: relative RMS error {error:.1e}"


@pytest.mark.parametrize("whole", [True, False])
def test_kernels(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the interpreter, which takes its time: a short one; on a GPU all. Gradients by one kernel, and by those of
    larger heads."""
    if not whole:
        monkeypatch.setattr(gpu, "_WHOLE_STATES", 0)
    made = packed(forgetting(drawn("m", 1, 24, rank=3)), 0, 0, 1, 24)
    assert_kernels_are_near(made._replace(reverse=True), torch.float16, PLACE)


@pytest.mark.parametrize(("rank", "whole"), [(1, True), (2, True), (1, False)])
def test_kernels_of_one_position(rank: int, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What states say of a decay: they are rounded to bfloat16 once, so of many rows no number is off by more."""
    if not whole:
        monkeypatch.setattr(gpu, "_WHOLE_STATES", 0)
    assert_kernels_are_near(drawn("one", ROWS // 4, 1, rank=rank), torch.bfloat16, PLACE)


def test_kernels_lose_no_nan() -> None:
    """A decay that is not a number is none that forgets all."""
    made = moved(halved(drawn("nan", 1, 5), torch.bfloat16), PLACE)
    made.A[:, 2] = torch.nan
    y, final = TRITON.run(made)
    assert y[:, :2].isfinite().all()
    assert y[:, 2:].isnan().all()
    assert final.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", SIZED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_on_a_gpu(case: str, dtype: torch.dtype) -> None:
    assert_kernels_are_near(SIZED[case](), dtype, device_or_skip("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["64 x 128, rank 4", "a long row, in segments"])
def test_kernels_give_the_same_bits_twice(case: str) -> None:
    made = moved(halved(SIZED[case](), torch.bfloat16), device_or_skip("cuda"))
    first, second = (outputs_and_gradients(TRITON, made) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_kernels_compile_in_one_graph() -> None:
    device_or_skip("cuda")
    made = moved(halved(drawn("compiled", 1, 3, rank=2), torch.bfloat16), PLACE)

    def run(x: torch.Tensor) -> torch.Tensor:
        y, final = trapezoidal_scan(x, *made[1:6], backend="triton")
        return y.float().sum() + final.sum()

    torch._dynamo.reset()
    x = made.x.clone().requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(run(x), x)[0])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_of_a_half_it_is_the_trapezoidal_rule(backend: str) -> None:
    """h' = A h + u, u linear between positions 0.01 apart: the error falls with the square of the step."""
    t = torch.linspace(0, 2, 201, dtype=torch.float64)
    x, ones = torch.sin(5 * t)[None, :, None, None, None], torch.ones(1, 201, 1, 1, 1, dtype=torch.float64)
    flat = torch.ones(1, 201, 1, dtype=torch.float64)
    y, _ = trapezoidal_scan(x, 0.01 * flat, -2 * flat, 0.5 * flat, ones, ones, backend=backend)
    exact = (2 * torch.sin(5 * t) - 5 * torch.cos(5 * t) + 5 * torch.exp(-2 * t)) / 29
    assert (y.flatten() - exact).abs().max() < 3e-4
    euler, _ = trapezoidal_scan(x, 0.01 * flat, -2 * flat, flat, ones, ones, backend=backend)
    assert (euler.flatten() - exact).abs().max() > 3e-3


def test_of_1_it_is_the_state_space_dual() -> None:
    made = drawn("dual", 2, 50)._replace(A=-torch.ones(2, 50, 2), trap=torch.ones(2, 50, 2))
    expected, last = ssd(
        made.x[:, :, :, 0], made.dt, -torch.ones(2), made.B[:, :, :, 0], made.C[:, :, :, 0],
        initial_state=made.initial_state,
    )  # fmt: skip
    y, final = trapezoidal_scan(*made[:6], initial_state=made.initial_state)
    torch.testing.assert_close(y[:, :, :, 0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_steps_are_the_whole(rank: int) -> None:
    made = drawn("steps", 2, 40, rank=rank)
    states = {name: getattr(made, name) for name in ("initial_state", "initial_x", "initial_B")}
    expected, final = trapezoidal_scan(*made[:6], **states)
    state, last_x, last_B = (value.clone() for value in states.values())
    for t in range(40):
        y = trapezoidal_update_(state, *(value[:, t] for value in made[:6]), last_x, last_B)  # type: ignore[call-arg]
        last_x, last_B = made.x[:, t], made.B[:, t]
        torch.testing.assert_close(y, expected[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def stepped(device: torch.device, dtype: torch.dtype, rank: int, head_dim: int, d_state: int) -> list[torch.Tensor]:
    """A state and what a step is given, of columns of wider rows."""
    draw, one = Draw("one step"), (3, 4)
    wide = draw.normal(3, 4 * rank * (2 * head_dim + 3 * d_state) + 1)[:, 1:].to(device, dtype)
    widths = [4 * rank * head_dim] * 2 + [4 * rank * d_state] * 3
    x, last_x, B, C, last_B = (part.unflatten(1, (4, rank, -1)) for part in wide.split(widths, dim=1))
    dt, A, trap = (
        value.to(device) for value in (draw.uniform(0, 1, *one), -draw.uniform(0, 2, *one), draw.uniform(0, 1, *one))
    )
    state = draw.normal(*one, head_dim, d_state).to(device)
    return [state, x, dt, A, trap, B, C, last_x, last_B]


@pytest.mark.parametrize(("rank", "head_dim", "d_state"), [(1, 5, 6), (3, 20, 16), (2, 3, 5), (2, 4, 1)])
@pytest.mark.parametrize("where", ["numba", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_a_step(where: str, dtype: torch.dtype, rank: int, head_dim: int, d_state: int) -> None:
    run, place = (step._on_cpu, torch.device("cpu")) if where == "numba" else (step._on_gpu, PLACE)
    state, *given = stepped(place, dtype, rank, head_dim, d_state)
    expected_state = state.double()
    expected = trapezoidal_update_(expected_state, *(value.double() for value in given))  # type: ignore[call-arg]
    y = run(state, *given)  # type: ignore[call-arg]
    assert y.dtype == dtype
    assert relative_rms_error(state, expected_state) < 1e-6
    assert relative_rms_error(y, expected) < {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]  # which may be cut off


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
def test_steps_on_a_gpu_are_kernels(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a state in bfloat16, too, which is rounded once a step."""
    device = device_or_skip("cuda")
    seen = calls_of(monkeypatch, step, "_on_gpu")
    state, *given = stepped(device, torch.bfloat16, rank, 64, 128)
    half, expected = state.bfloat16(), state.bfloat16().double()
    trapezoidal_update_(half, *given)  # type: ignore[call-arg]
    trapezoidal_update_(expected, *(value.double() for value in given))  # type: ignore[call-arg]
    assert len(seen) == 1
    assert relative_rms_error(half, expected) < 2**-9


def test_sums_of_many_are_made_of_few() -> None:
    values = Draw("sums").normal(2, 64 * 64 + 5, 3).double()
    for n in (64 * 64 + 5, 64 * 64):
        torch.testing.assert_close(sums(values[:, :n]), values[:, :n].cumsum(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 4, 2, 3)}, "x must be"),
        ({"x": torch.zeros(1, 4, 2, 1, 3, dtype=torch.int64)}, "x must be real"),
        ({"trap": torch.zeros(1, 4)}, "trap must be"),
        ({"B": torch.zeros(1, 4, 2, 5)}, "B must be"),
        ({"C": torch.zeros(1, 4, 2, 1, 6)}, "C must have the shape of B"),
        ({"A": torch.zeros(1, 4, 2, device="meta")}, "A is on meta, but x is on cpu"),
        ({"initial_state": torch.zeros(1, 2, 5, 3)}, "initial_state must be"),
        ({"initial_x": torch.zeros(1, 2, 1, 3)}, "go together"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must rise"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"backend": "triton"}, "multiply matrices of bfloat16 or float16"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    given = {"x": torch.zeros(1, 4, 2, 1, 3), **{name: torch.zeros(1, 4, 2) for name in ("dt", "A", "trap")}}
    given |= {name: torch.zeros(1, 4, 2, 1, 5) for name in ("B", "C")}
    with pytest.raises(ValueError, match=message):
        trapezoidal_scan(**(given | change))
