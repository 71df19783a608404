"""What the Numba kernels are made of: elementary functions, the sharing of work, flat views."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
import torch
from numba import njit, vectorize
from numba.core.registry import CPUDispatcher

from mambaseq.ops.cpu import blocking, flat, threads, vector_math


def in_float32(function):  # type: ignore[no-untyped-def]
    return vectorize(["float32(float32)"])(lambda v: function(v))


@pytest.mark.parametrize(
    ("name", "exact", "low", "high"),
    [
        ("exp2", np.exp2, -126, 127),
        ("exp2m1", lambda v: np.expm1(v * np.log(2)), -126, 127),
        ("exp2m1", lambda v: np.expm1(v * np.log(2)), -1e-3, 1e-3),
        ("sigmoid", lambda v: 1 / (1 + np.exp(-v)), -80, 80),
        ("softplus", lambda v: np.log1p(np.exp(v)), -80, 80),
    ],
)
def test_relative_error(name, exact, low, high) -> None:  # type: ignore[no-untyped-def]
    v = np.linspace(low, high, 100_001).astype(np.float32)
    expected = exact(v.astype(np.float64))
    actual = in_float32(getattr(vector_math, name))(v)
    error = np.abs(actual - expected) / np.maximum(np.abs(expected), 1e-37)
    # An argument such as v · log2(e) is rounded before its exponential is taken.
    assert error.max() < 4e-7 + (3e-8 * max(abs(low), abs(high)) * 1.5 if name in ("sigmoid", "softplus") else 0)


@pytest.mark.parametrize("name", ["exp2", "exp2m1", "sigmoid", "softplus"])
def test_not_a_number_and_infinity(name: str) -> None:
    function = in_float32(getattr(vector_math, name))
    assert np.isnan(function(np.float32(np.nan)))
    low, high = function(np.float32(-np.inf)), function(np.float32(np.inf))
    assert low == pytest.approx({"exp2m1": -1.0}.get(name, 0.0), abs=1e-37)
    assert high == 1.0 if name == "sigmoid" else high > 1e38


def test_loops_over_them_are_vectorised() -> None:
    """The whole point of them: the loop multiplies vectors, not single numbers."""
    exp2m1 = vector_math.exp2m1

    @njit(fastmath=vector_math.FASTMATH, error_model="numpy")
    def loop(v, out):  # type: ignore[no-untyped-def]
        for k in range(len(v)):
            out[k] = exp2m1(v[k])

    loop(np.zeros(64, np.float32), np.zeros(64, np.float32))
    (llvm,) = loop.inspect_llvm().values()
    assert re.search(r"fmul [a-z ]*<\d+ x float>", llvm)


@pytest.mark.parametrize("serial", [False, True])
def test_share_does_every_task_once(serial: bool) -> None:
    done = np.zeros(1000, dtype=np.int64)
    workers = []

    def make_worker():  # type: ignore[no-untyped-def]
        workers.append(None)

        def work(first: int, end: int) -> None:
            done[first:end] += 1

        return work

    threads.share(1000, make_worker, serial=serial)
    assert (done == 1).all()
    assert len(workers) <= (1 if serial else torch.get_num_threads())
    threads.share(0, make_worker)


def test_share_hands_on_what_a_worker_raises() -> None:
    def make_worker():  # type: ignore[no-untyped-def]
        def work(first: int, end: int) -> None:
            raise RuntimeError("broken")

        return work

    with pytest.raises(RuntimeError, match="broken"):
        threads.share(10, make_worker)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(24.0).view(2, 3, 4),
        torch.arange(48.0).view(2, 3, 8)[..., 4:],
        torch.arange(48.0).view(2, 6, 4)[:, ::2],
        torch.arange(24.0).view(2, 4, 3).transpose(1, 2),
        torch.arange(6.0).view(2, 3, 1).expand(2, 3, 4),
        torch.arange(24.0).view(2, 3, 4).to(torch.bfloat16),
        torch.arange(3.0).view(1, 3, 1),
        torch.arange(8.0).view(2, 1, 4)[:, :, 1:],
    ],
)
def test_rows_of(x: torch.Tensor) -> None:
    array, stride = flat.rows_of(x)
    channels = x.shape[-1]
    rows = [array[i * stride : i * stride + channels] for i in range(x.shape[0] * x.shape[1])]
    np.testing.assert_array_equal(np.stack(rows), x.float().reshape(-1, channels).numpy())
    assert array.dtype == np.float32


def test_rows_of_shares_the_memory_of_slices() -> None:
    whole = torch.zeros(2, 3, 8)
    array, stride = flat.rows_of(whole[..., 4:])
    assert stride == 8
    whole[0, 0, 4] = 5
    assert array[0] == 5


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (64, 1), (130, 1), (130, 2), (12, 4)])
def test_blocks(channels: int, groups: int) -> None:
    found = blocking.of_channels(channels, groups, 64)
    value = torch.randn(channels, 3)
    assert torch.equal(found.gather(found.spread(value)), value)
    assert (found.spread(value)[~found.real] == 0).all()
    per_group = channels // groups
    for first, width, group in zip(found.first, found.width, found.group, strict=True):
        assert group * per_group <= first < first + width <= (group + 1) * per_group
    assert found.width.sum() == channels


@pytest.mark.parametrize("lengths", [[5], [0], [], [0, 0, 3], [1] * 100, [1000, 1, 1, 1, 5, 0]])
def test_tasks_cover_every_sequence_of_every_block(lengths: list[int]) -> None:
    found = blocking.of_channels(130, 1, 64)
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tasks = blocking.tasks_of(found, bounds)
    seen = sorted((block, s) for block, *_, s0, s1 in tasks for s in range(s0, s1))
    assert seen == [(block, s) for block in range(3) for s in range(len(lengths))]


def test_parts_of_kernels_are_compiled_without_what_python_calls() -> None:
    """A quarter of the time to compile; the kernels of an op's folder all say so."""
    for name in ("selective_scan", "causal_conv", "lti", "decoding"):
        module = importlib.import_module(f"mambaseq.ops.{name}.kernels")
        parts = [v for k, v in vars(module).items() if k.startswith("_") and isinstance(v, CPUDispatcher)]
        assert parts
        assert all(part.targetoptions["no_cpython_wrapper"] for part in parts)
