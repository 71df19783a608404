"""What the tests of the ops share: tolerances, poisoned memory, comparison with the reference."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from mambaseq.ops.dispatch import Backend, Op, leaves, outputs_and_gradients, relative_rms_error

# Largest relative RMS error of an output or gradient against the reference in float64 on the same (rounded)
# inputs and cotangents. A constant decay that is rounded to float32, by 2^-25 at the most, is off by a thousand times
# as much after a thousand steps; half-precision results carry the rounding of the output itself, 2^-9 and 2^-12 at the
# most. It says something of many numbers only: of sums of thousands of products of either sign, two or four may all be
# small, which the rounding of what is multiplied is not.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# Where a row is one position, and a gradient one number a head, there are so many rows. Kernels that multiply bfloat16,
# and float64 with nothing but an initial state rounded to it, are 1.3e-3 to 1.9e-3 off in a hundred such numbers, and
# above 4e-3 in one of 10 to 30 choices of four of them.
ROWS = 64

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def device_or_skip(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none here")
    return torch.device(name)


class Draw:
    """Pseudo-random tensors that depend on a label alone."""

    def __init__(self, label: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(label.encode()))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)


def moved(arguments: Any, device: torch.device) -> Any:
    return type(arguments)(*(v.to(device) if isinstance(v, Tensor) else v for v in arguments))


def names_of(arguments: Any) -> list[str]:
    floating = [
        name
        for name, value in arguments._asdict().items()
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    ]
    outputs = ["y", "final state"] if getattr(arguments, "wants_final_state", True) else ["y"]
    return [*outputs, *(f"gradient of {name}" for name in floating)]


def backend_or_skip(op: Op, name: str, arguments: Any) -> Backend:
    backend = next(candidate for candidate in op.backends if candidate.name == name)
    reason = backend.why_not(leaves(arguments))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return backend


def assert_equals_reference(
    op: Op, name: str, build: Callable[[], Any], device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Outputs and all gradients of a backend, computed in poisoned memory, equal those of the reference."""
    arguments = moved(build(), device)
    backend = backend_or_skip(op, name, arguments)
    with poisoned_memory():
        actual = outputs_and_gradients(backend, arguments)
    expected = _expected(op.name, op.backends[-1], build, tuple(a.dtype for a in actual))
    for label, a, e in zip(names_of(arguments), actual, expected, strict=True):
        error = relative_rms_error(a.cpu(), e)
        assert error <= TOLERANCE[dtype], f"{name}, {label}: relative RMS error {error:.1e}"


@functools.cache
def _expected(
    op_name: str, reference: Backend, build: Callable[[], Any], dtypes: tuple[torch.dtype, ...]
) -> list[Tensor]:
    return outputs_and_gradients(reference, build(), double=True, like=dtypes)


def errors_by_name(backend: Backend, exact: Backend, arguments: Any) -> dict[str, float]:
    """Of outputs and all gradients of a backend, computed in poisoned memory, against another one in float64 on the
    same rounded inputs."""
    with poisoned_memory():
        actual = outputs_and_gradients(backend, arguments)
    expected = outputs_and_gradients(exact, arguments, double=True, like=[a.dtype for a in actual])
    pairs = zip(names_of(arguments), actual, expected, strict=True)
    return {label: relative_rms_error(a, e) for label, a, e in pairs}


@functools.cache
def _numba_knows_numpy() -> None:
    """When it first compiles, numba looks up NumPy's functions, and would take a poisoned one for good."""
    numba.njit(lambda: np.empty(1))()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that is asked for uninitialised is full of NaN. (Kernels of Numba that ask for some themselves are to be
    compiled before.)"""

    def poison_tensor(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            value = allocate(*args, **kwargs)
            floating = value.is_floating_point() or value.is_complex()
            with torch.no_grad():  # PyTorch's own may be leaves that ask for gradients
                return value.fill_(float("nan")) if floating else value

        return poisoned

    def poison_array(*args: Any, **kwargs: Any) -> np.ndarray:
        value = allocate_array(*args, **kwargs)
        if np.issubdtype(value.dtype, np.floating):
            value.fill(np.nan)
        return value

    _numba_knows_numpy()
    allocate_array = np.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poison_tensor(torch.empty))
        patch.setattr(torch, "empty_like", poison_tensor(torch.empty_like))
        patch.setattr(Tensor, "new_empty", poison_tensor(Tensor.new_empty))
        patch.setattr(np, "empty", poison_array)
        yield


def calls_of(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """A list that grows by an entry with every call of `module.name`."""
    seen: list[None] = []
    original = getattr(module, name)

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return seen
