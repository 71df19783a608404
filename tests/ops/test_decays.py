"""The first law for log-decays of channels, and vectors of one length: kernels equal the definition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import DEVICES, Draw, assert_equals_reference, device_or_skip
from torch import Tensor

from mambaseq.ops import OPS, log_decays, unit_norm
from mambaseq.ops.decays.arguments import DecayArguments
from mambaseq.ops.dispatch import relative_rms_error
from mambaseq.ops.gpu import portable
from mambaseq.ops.norm.arguments import UnitNormArguments

DECAYS, UNIT = OPS["log_decays"], OPS["unit_norm"]


def decays(label: str, heads: int, *shape: int, bound: float | None = None) -> DecayArguments:
    draw = Draw(label)
    return DecayArguments(2 * draw.normal(*shape), draw.normal(heads), draw.normal(shape[-1]), bound)


def unit(label: str, size: int, *shape: int, **options: float) -> UnitNormArguments:
    return UnitNormArguments(Draw(label).normal(*shape), size, **options)


CASES: dict[str, dict[str, Callable[[], Any]]] = {
    DECAYS.name: {
        "one row": lambda: decays("a", 1, 1, 1, 65),
        "heads": lambda: decays("b", 3, 2, 63, 66),
        "many rows": lambda: decays("c", 2, 3, 411, 14),
        "bound": lambda: decays("d", 3, 2, 63, 66, bound=-5.0),
        "one channel": lambda: decays("e", 4, 5, 4, bound=-1.0),
        "rows apart": lambda: decays("f", 3, 2, 9, 33)._replace(f=Draw("g").normal(2, 9, 66)[..., 33:]),
    },
    UNIT.name: {
        "one row": lambda: unit("a", 65, 1, 1, 65),
        "heads": lambda: unit("b", 22, 2, 63, 66, scale=0.25),
        "many rows": lambda: unit("c", 7, 3, 411, 14),
        "large eps": lambda: unit("d", 3, 5, 24, eps=0.5),
        "too wide": lambda: unit("e", 8193, 2, 8193),
        "rows apart": lambda: unit("f", 11, 2, 9, 33)._replace(x=Draw("g").normal(2, 9, 66)[..., 33:]),
        "channels apart": lambda: unit("h", 11, 2, 9, 33)._replace(x=Draw("i").normal(2, 33, 9).transpose(1, 2)),
    },
}
PAIRS = [(op, backend.name, case) for op in (DECAYS, UNIT) for backend in op.backends for case in CASES[op.name]]


@functools.cache
def build(op: str, case: str, **dtypes: torch.dtype) -> Callable[[], Any]:
    @functools.cache
    def arguments() -> Any:
        made = CASES[op][case]()
        return made._replace(**{name: getattr(made, name).to(dtype) for name, dtype in dtypes.items()})

    return arguments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "backend", "case"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_equals_reference(op: Any, backend: str, case: str, device: str) -> None:
    assert_equals_reference(op, backend, build(op.name, case), device_or_skip(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "low"), [(DECAYS, "f"), (UNIT, "x")], ids=lambda value: getattr(value, "name", value))
def test_in_half_precision(op: Any, low: str, dtype: torch.dtype, device: str) -> None:
    assert_equals_reference(op, "triton", build(op.name, "heads", **{low: dtype}), device_or_skip(device), dtype)


class _Ignored(torch.autograd.Function):
    """Has no gradient for what it reads."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:
        return None


@pytest.mark.parametrize("device", DEVICES)
def test_where_there_is_no_gradient_there_is_none_before(device: str) -> None:
    """None of another shape either, which kernels would read beyond."""
    place = device_or_skip(device)
    if (reason := portable.why_not(device)) is not None:
        pytest.skip(f"triton: {reason}")
    f, A_log, bias = (v.to(place).requires_grad_() for v in decays("none", 3, 2, 9, 15) if isinstance(v, Tensor))
    g = log_decays(unit_norm(f, 5, backend="triton"), A_log, bias, backend="triton")
    _Ignored.apply(g).backward()
    assert [v.grad for v in (f, A_log, bias)] == [None] * 3


def test_by_hand() -> None:
    y = unit_norm(torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 2.0]), 2, scale=0.5, eps=0)
    torch.testing.assert_close(y[[0, 1, 4, 5]], torch.tensor([0.3, 0.4, 0.0, 0.5]))
    assert (unit_norm(torch.zeros(4), 2) == 0).all()
    f, A_log, bias = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 2.0])
    g = log_decays(f, A_log, bias)
    assert g.shape == (2, 1)
    torch.testing.assert_close(g.flatten(), -torch.tensor([1.0, torch.e]) * torch.log(torch.tensor(2.0)))
    torch.testing.assert_close(log_decays(f, A_log, bias, lower_bound=-4.0), torch.full((2, 1), -2.0))
    assert log_decays(f.bfloat16(), A_log, bias).dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_give_the_same_bits(device: str) -> None:
    place = device_or_skip(device)
    if (reason := portable.why_not(device)) is not None:
        pytest.skip(f"triton: {reason}")
    tensors = [v.to(place).requires_grad_() for v in decays("bits", 3, 700, 66) if isinstance(v, Tensor)]
    runs = [torch.autograd.grad(log_decays(*tensors, backend="triton").square().sum(), tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_equals_eager(device: str) -> None:
    place = device_or_skip(device)
    if (reason := portable.why_not(device)) is not None:
        pytest.skip(f"triton: {reason}")

    def run(f: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
        g = log_decays(unit_norm(f, 5, scale=0.5, backend="triton"), A_log, bias, backend="triton")
        return g.square().sum()

    tensors = [v.to(place).requires_grad_() for v in decays("compiled", 3, 2, 9, 15) if isinstance(v, Tensor)]
    torch._dynamo.reset()
    eager, compiled = run, torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [[f(*tensors), *torch.autograd.grad(f(*tensors), tensors)] for f in (eager, compiled)]
    for one, other in zip(*results, strict=True):
        assert relative_rms_error(one.detach(), other.detach()) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f": torch.zeros(2, 6, dtype=torch.int64)}, "f must be real"),
        ({"dt_bias": torch.zeros(4)}, "dt_bias must have the last axis of f"),
        ({"A_log": torch.zeros(4)}, "divide 6 channels"),
        ({"A_log": torch.zeros(3, device="meta")}, "A_log is on meta"),
    ],
)
def test_decays_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    given = {"f": torch.zeros(2, 6), "A_log": torch.zeros(3), "dt_bias": torch.zeros(6)}
    with pytest.raises(ValueError, match=message):
        log_decays(**(given | change))


@pytest.mark.parametrize(
    ("x", "size", "message"),
    [
        (torch.zeros(6, dtype=torch.int32), 6, "x must be real"),
        (torch.zeros(6), 4, "does not divide"),
        (torch.zeros(6), 0, "does not"),
    ],
)
def test_vectors_that_do_not_fit(x: Tensor, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unit_norm(x, size)
