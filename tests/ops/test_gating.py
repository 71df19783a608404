"""What stands around Mamba-3's scan: kernels equal PyTorch in float64, gradients too."""

from __future__ import annotations

import pytest
import torch
from agreement import DEVICES, TOLERANCE, Draw, device_or_skip, poisoned_memory

from mambaseq.ops.dispatch import relative_rms_error
from mambaseq.ops.trapezoid import gating, writing
from mambaseq.ops.trapezoid.gating import GateArguments, gated, kernel


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("programs", [1024, 3])  # a tile each, or two, of which the last is none
def test_kernels_equal_the_definition(
    programs: int, rank: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gating, "_PROGRAMS", programs)
    draw, place, (heads, head_dim) = Draw("gating"), device_or_skip(device), (2, 20)
    # columns of wider rows, as a projection has them
    v, z = draw.normal(1, 37, 2 * heads * head_dim + 2)[..., 1:-1].half().unflatten(-1, (2, heads, head_dim)).unbind(2)
    y = draw.normal(1, 37, rank or 1, heads, head_dim).half().transpose(2, 3)
    maps = [draw.normal(heads, rank, head_dim) for _ in range(3)] if rank else []
    made, found, expected = (y, v, z, draw.normal(heads), *maps), [], []
    for run, wide, results in ((kernel, False, found), (gated, True, expected)):
        leaves = [t.to(place, torch.float64 if wide else t.dtype).detach().requires_grad_() for t in made]
        with poisoned_memory():
            out = run(GateArguments(*leaves))
        assert out.dtype == (torch.float64 if wide else torch.float16)
        cotangent = Draw("cotangent").normal(1, 37, heads, head_dim).half().to(place, out.dtype)
        results += [out, *torch.autograd.grad(out, leaves, cotangent)]
    for a, e in zip(found, expected, strict=True):
        assert relative_rms_error(a, e) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("programs", [1024, 3])
def test_what_is_written_equals_the_definition(
    programs: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gating, "_PROGRAMS", programs)
    draw, place, (heads, rank, head_dim) = Draw("writing"), device_or_skip(device), (2, 3, 20)
    v = draw.normal(1, 37, heads * head_dim + 2)[..., 1:-1].to(place, dtype).unflatten(-1, (heads, head_dim))
    x_map, cotangent = draw.normal(heads, rank, head_dim).to(place), draw.normal(1, 37, heads, rank, head_dim).to(dtype)
    found, expected = [], []
    for wide, results in ((False, found), (True, expected)):
        leaves = [t.to(torch.float64 if wide else t.dtype).detach().requires_grad_() for t in (v, x_map)]
        with poisoned_memory():
            given = writing.WriteArguments(*leaves)
            out = writing.written(*leaves, torch.float64) if wide else writing.kernel(given)
        results += [out, *torch.autograd.grad(out, leaves, cotangent.to(place, out.dtype))]
    assert found[0].dtype == dtype
    assert found[0].shape == (1, 37, heads, rank, head_dim)
    assert found[0].transpose(2, 3).is_contiguous()  # as the scan's kernels read it, without a copy
    for a, e in zip(found, expected, strict=True):
        assert relative_rms_error(a, e) < TOLERANCE[dtype]
