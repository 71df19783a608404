"""B and C of Mamba-3 as its scan takes them: kernels equal PyTorch in float64, gradients too."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import DEVICES, Draw, device_or_skip, poisoned_memory

from mambaseq.ops.dispatch import relative_rms_error
from mambaseq.ops.trapezoid import turning
from mambaseq.ops.trapezoid.turning import TurnArguments, kernel, turned

HEADS = 2


def drawn(halves: bool, rank: int, groups: int, d_state: int, n_angles: int) -> TurnArguments:
    draw = Draw(f"{halves} {rank} {groups} {d_state}")
    B, C = (draw.normal(1, 18, rank, groups, d_state) for _ in range(2))
    B_bias, C_bias = (draw.normal(HEADS, rank, d_state) for _ in range(2))
    return TurnArguments(B, C, B_bias, C_bias, 1e4 * draw.normal(1, 18, HEADS, n_angles).double(), halves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("sizes", [(False, 1, 1, 8, 2), (True, 2, 2, 12, 6), (False, 1, 2, 32, 8)])
def test_kernels_equal_the_definition(
    sizes: tuple, wrapped: bool, rounded: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Angles of thousands of turns keep their digits. A program takes all heads of a group, or one."""
    if rounded:
        monkeypatch.setattr(turning, "_PROGRAMS", 1)
    made, place = drawn(*sizes)._replace(rounded=rounded), device_or_skip(device)
    if wrapped:
        made = made._replace(angle=torch.remainder(made.angle, 2 * math.pi).float())
    found, expected = [], []
    cotangents = [Draw("cotangents").normal(1, 18, HEADS, sizes[1], sizes[3]).bfloat16() for _ in range(2)]
    for run, wide, results in ((kernel, False, found), (turned, True, expected)):
        leaves = [v.to(place, torch.float64 if wide else v.dtype).requires_grad_() for v in made[:5]]
        with poisoned_memory():
            outputs = run(TurnArguments(*leaves, made.halves, rounded and not wide))
        assert outputs[0].dtype == (torch.float64 if wide else torch.bfloat16 if rounded else torch.float32)
        given = [c.to(place, y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
        results += [*outputs, *torch.autograd.grad(outputs, leaves, given)]
    for i, (a, e) in enumerate(zip(found, expected, strict=True)):
        assert relative_rms_error(a, e) < (3e-3 if rounded and i < 2 else 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_cosines_and_sines_keep_their_digits(device: str) -> None:
    """Of every quarter, of either sign, and where they change places."""
    place = device_or_skip(device)
    eighths = torch.arange(-16, 17) * math.pi / 4
    angle = torch.cat([torch.linspace(-12, 12, 447), eighths, eighths + 1e-6]).float().view(1, 27, 1, 19).to(place)
    B = torch.tensor([1.0, 0.0]).repeat(19).expand(1, 27, 1, 1, 38).to(place)
    bias = torch.zeros(1, 1, 38, device=place)
    found, _ = kernel(TurnArguments(B, B, bias, bias, angle, False))
    cos, sin = found[:, :, 0, 0].unflatten(-1, (-1, 2)).double().unbind(-1)
    wide = angle[:, :, 0].double()
    assert float((cos - wide.cos()).abs().max()) < 1.5e-7
    assert float((sin - wide.sin()).abs().max()) < 1.5e-7


def test_what_begins_within_a_word_is_moved() -> None:
    """Such as a bias that is a part of all weights in one tensor; a GPU refuses to read it."""
    values = torch.arange(9.0)
    (found,) = turning._aligned(values[1:])
    assert found.data_ptr() % 16 == 0
    assert torch.equal(found, values[1:])
    assert turning._aligned(values)[0] is values
