"""Mixers whose state-space dual a package or our kernels compute in half precision: what they are handed, and that
the result is the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mambaseq.domain import catalog
from mambaseq.ops import OPS, dispatch
from mambaseq.ops.dispatch import PACKAGES, relative_rms_error
from mambaseq.ops.ssd import chunked
from mambaseq.ops.ssd.arguments import SsdArguments
from mambaseq.ops.ssd.packages import input_dtype

CASES = [
    ("mamba2", {"d_state": 32}),
    ("retention", {}),
    ("linear_attention", {}),
    ("linear_attention", {"rope": False}),
]
IDS = [" ".join([name, *options]) for name, options in CASES]
NEAR = 0.02  # of half precision in the mixer, whoever computes


def pair(name: str, options: dict, backend: str, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The mixer, and the same by the package."""
    mixers = []
    for extra in ({}, {"backend": backend}):
        torch.manual_seed(0)
        mixers.append(catalog()["mixers"].get(name)(64, **options, **extra).to(device))
    return mixers[0], mixers[1]


@contextmanager
def skipped_where_refused() -> Iterator[None]:
    """By the package's own limits; any other error fails the test."""
    try:
        yield
    except ValueError as error:
        if "cannot run these arguments" not in str(error):
            raise
        pytest.skip(str(error))


def handed(monkeypatch: pytest.MonkeyPatch) -> list[SsdArguments]:
    """What "fla" will have been given: ours takes its place."""
    seen: list[SsdArguments] = []

    def run(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
        seen.append(arguments)
        return chunked.run(arguments)

    module, op = sys.modules["mambaseq.ops.ssd"], OPS["ssd"]
    package = dispatch.Backend("fla", run, dispatch.never)
    own = next(backend for backend in op.backends if backend.name == "torch")
    monkeypatch.setattr(module, "OP", op._replace(backends=(own, package)))
    return seen


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packages_are_handed_half_precision(
    name: str, options: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And states, packed sequences and final states where they are wanted only."""
    seen = handed(monkeypatch)
    own, other = pair(name, options, "fla", "cpu")
    x = torch.randn(1, 90, 64)
    bounds = torch.tensor([0, 40, 90], dtype=torch.int32)
    with torch.no_grad():
        expected, state = own(x[:, :50], return_state=True)
        rest = own(x[:, 50:], state=state)
        with torch.autocast("cpu", dtype=dtype):
            for actual, wanted in zip(
                (*other(x[:, :50], return_state=True)[:1], other(x[:, 50:], state=state), other(x, cu_seqlens=bounds)),
                (expected, rest, own(x, cu_seqlens=bounds)),
                strict=True,
            ):
                assert relative_rms_error(actual.float(), wanted.double()) < NEAR
    assert [arguments.wants_final_state for arguments in seen] == [True, False, False]
    assert [arguments.initial_state is None for arguments in seen] == [True, False, True]
    taken = dtype if name == "mamba2" else torch.bfloat16  # sums without decay leave the range of float16
    assert {arguments.x.dtype for arguments in seen} == {taken}
    assert all(arguments.A.dtype == torch.float32 for arguments in seen)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", [None, "torch", "reference", "triton", "mamba_ssm", "fla"])
def test_nothing_is_rounded_that_was_not(backend: str | None, device: str) -> None:
    """Full precision stays, also for kernels that multiply in half precision, which then say that they cannot."""
    by_kernels = backend in (*PACKAGES, "triton") or (backend is None and device == "cuda")
    half = torch.bfloat16 if by_kernels else torch.float32
    for activations, taken in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, half),
        (torch.float16, half),
    ):
        assert input_dtype(backend, activations, torch.device(device)) == taken


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_handed_on(
    name: str, options: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = handed(monkeypatch)
    pair(name, options, "fla", "cpu")[1].to(dtype)(torch.randn(1, 9, 64, dtype=dtype))
    assert [arguments.x.dtype for arguments in seen] == [dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("backend", ["triton", "fla", "mamba_ssm"])
@pytest.mark.parametrize("packed", [False, True])
def test_packages_on_a_gpu(name: str, options: dict, backend: str, packed: bool) -> None:
    own, other = pair(name, options, backend, "cuda")
    x = torch.randn(1 if packed else 2, 1000, 64, device="cuda")
    bounds = torch.tensor([0, 63, 400, 1000], dtype=torch.int32, device="cuda") if packed else None
    with torch.no_grad():
        expected, expected_state = own(x, cu_seqlens=bounds, return_state=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            with skipped_where_refused():
                actual = other(x, cu_seqlens=bounds)
            assert relative_rms_error(actual.float(), expected.double()) < NEAR
            if backend == "mamba_ssm" and packed:
                return  # it takes no states of packed sequences
            actual, state = other(x, cu_seqlens=bounds, return_state=True)
            further = other(x, state=expected_state, cu_seqlens=bounds)
        expected = own(x, state=expected_state, cu_seqlens=bounds)
    assert relative_rms_error(further.float(), expected.double()) < NEAR
    for a, e in zip(state.tensors().values(), expected_state.tensors().values(), strict=True):
        assert relative_rms_error(a.float(), e.double()) < NEAR


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("backend", ["triton", "fla", "mamba_ssm"])
def test_gradients_of_packages_on_a_gpu(name: str, options: dict, backend: str) -> None:
    own, other = pair(name, options, backend, "cuda")
    x = torch.randn(2, 1000, 64, device="cuda")
    direction = torch.randn_like(x)
    own(x).backward(direction)
    with torch.autocast("cuda", dtype=torch.bfloat16), skipped_where_refused():
        y = other(x)
    y.backward(direction.to(y.dtype))
    for (label, mine), theirs in zip(own.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert relative_rms_error(theirs.grad.float(), mine.grad.double()) < 2 * NEAR, label
