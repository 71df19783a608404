"""The angles of Mamba-3, added up: kernels equal PyTorch in float64, gradients too."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import DEVICES, Draw, device_or_skip, poisoned_memory
from torch import Tensor

from mambaseq.ops.dispatch import relative_rms_error
from mambaseq.ops.trapezoid import angles
from mambaseq.ops.trapezoid.angles import AngleArguments, added_up, kernel


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two angles, whole turns aside."""
    return float(torch.remainder(found.double() - expected + math.pi, 2 * math.pi).sub(math.pi).abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "shared", "n", "bounds"),
    [
        (70, 3, True, 5, None),
        (33, 2, False, 4, None),
        (1, 1, True, 1, None),
        (70, 2, True, 5, [0, 0, 3, 32, 40, 40, 70, 70]),
        (64, 2, False, 4, [0, 64, 64]),
    ],
)
def test_kernels_equal_the_definition(
    length: int,
    heads: int,
    shared: bool,
    n: int,
    bounds: list[int] | None,
    begun: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program takes the gradients of two heads, or of one."""
    if begun:
        monkeypatch.setattr(angles, "_PROGRAMS", 3)
    place, draw = device_or_skip(device), Draw(f"angles {length} {begun}")
    batch, several = (2, 2) if bounds is None else (1, len(bounds) - 1)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=place)
    values = draw.normal(batch, length, 1 if shared else heads, n + 2)[..., 1 : n + 1]
    values[0, 0] *= 1e-6  # tanh to its digits where it is small
    dt = draw.uniform(0, 1, batch, heads, length).mT
    before = 1e4 * draw.normal(several, heads, n).double() if begun else None
    cotangents = draw.normal(batch, length, heads, n), draw.normal(several, heads, n).double()
    found, expected = [], []
    for run, dtype, results in ((kernel, torch.float32, found), (added_up, torch.float64, expected)):
        leaves = [None if v is None else v.to(place, torch.float64 if v is before else dtype).requires_grad_()
                  for v in (values, dt, before)]  # fmt: skip
        with poisoned_memory():
            outputs = run(AngleArguments(*leaves, cu_seqlens))
        given = [c.to(place, y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
        results += [*outputs, *torch.autograd.grad(outputs, [v for v in leaves if v is not None], given)]
    assert found[0].dtype == torch.float32
    found, expected = ([value.detach() for value in values] for values in (found, expected))
    assert float(found[0].min()) >= 0
    assert float(found[0].max()) < 6.2832
    assert apart(found[0], expected[0]) < 2e-6
    assert float((found[1] - expected[1]).abs().max()) < 2e-6
    assert all(relative_rms_error(a, e) < 1e-6 for a, e in zip(found[2:], expected[2:], strict=True))
    small = slice(0, 1), slice(0, 1)
    assert relative_rms_error(found[2][small], expected[2][small]) < 1e-6


@pytest.mark.parametrize("before", [None, torch.ones(2, 3, 4, dtype=torch.float64)])
def test_no_positions_leave_angles_as_they_were(before: Tensor | None) -> None:
    angle, last = added_up(AngleArguments(torch.zeros(2, 0, 1, 4), torch.zeros(2, 0, 3), before))
    assert angle.shape == (2, 0, 3, 4)
    assert torch.equal(last, torch.zeros(2, 3, 4, dtype=torch.float64) if before is None else before)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [3, 5, 16])
def test_gradients_repeat_bit_for_bit(n: int) -> None:
    place, draw = device_or_skip("cuda"), Draw("angles repeat")
    values, dt = draw.normal(2, 100, 1, n).to(place).requires_grad_(), draw.uniform(0, 1, 2, 100, 8).to(place)
    dt.requires_grad_()
    dangle = draw.normal(2, 100, 8, n).to(place)
    first, *others = (
        torch.autograd.grad(kernel(AngleArguments(values, dt))[0], (values, dt), dangle) for _ in range(20)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_compilers_are_told_the_shapes_of_what_kernels_make() -> None:
    draw = Draw("angles compiled")
    values, dt = draw.normal(1, 33, 1, 5)[..., 1:4].requires_grad_(), draw.uniform(0, 1, 1, 2, 33).mT.requires_grad_()
    before = draw.normal(3, 2, 3).double().requires_grad_()
    bounds = torch.tensor([0, 0, 3, 33], dtype=torch.int32)
    given = values, dt, before, bounds
    torch.library.opcheck(
        torch.ops.mambaseq.mamba3_angles.default, given, test_utils=("test_schema", "test_faketensor")
    )
