"""The WKV: the scan equals the loop, and the loop the published sums, whatever the size of k."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from agreement import DEVICES, Draw, assert_equals_reference, device_or_skip

from mambaseq.ops import OPS, wkv
from mambaseq.ops.wkv import WkvArguments, empty_state, wkv_update_

OP = OPS["wkv"]


def drawn(label: str, batch: int, length: int, channels: int, size: float = 1.0) -> WkvArguments:
    draw = Draw(label)
    return WkvArguments(
        k=size * draw.uniform(-1, 1, batch, length, channels),
        v=draw.normal(batch, length, channels),
        w=torch.exp(draw.uniform(-6, 2, channels)),
        u=draw.normal(channels),
        initial_state=torch.stack([draw.normal(batch, channels), *draw.uniform(0.5, 2, 2, batch, channels)], dim=1),
    )


def packed(arguments: WkvArguments, *bounds: int) -> WkvArguments:
    state = drawn("states", len(bounds) - 1, 0, arguments.k.shape[2]).initial_state
    return arguments._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32), initial_state=state)


CASES: dict[str, Callable[[], WkvArguments]] = {
    "length 0": lambda: drawn("a", 2, 0, 3),
    "length 1": lambda: drawn("b", 2, 1, 3),
    "length 2": lambda: drawn("c", 2, 2, 3),
    "length 63": lambda: drawn("d", 2, 63, 5),
    "length 3001": lambda: drawn("e", 1, 3001, 4),
    "no state": lambda: drawn("f", 2, 40, 3)._replace(initial_state=None),
    "packed": lambda: packed(drawn("g", 1, 100, 3), 0, 0, 1, 40, 40, 97, 100, 100),
    "packed, no state": lambda: packed(drawn("h", 1, 70, 3), 0, 30, 30, 70)._replace(initial_state=None),
    "packed, length 0": lambda: packed(drawn("i", 1, 0, 3), 0, 0, 0),
    "k up to 80": lambda: drawn("j", 2, 500, 6, size=80),
    "packed, k up to 80": lambda: packed(drawn("k", 1, 200, 6, size=80), 0, 3, 120, 200),
}
CASES = {name: functools.cache(build) for name, build in CASES.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, device: str) -> None:
    assert_equals_reference(OP, "torch", CASES[case], device_or_skip(device))


@functools.cache
def halves() -> WkvArguments:
    made = drawn("l", 2, 100, 5)
    return made._replace(k=made.k.to(torch.bfloat16), v=made.v.to(torch.bfloat16))


def test_bfloat16_accumulates_in_float32() -> None:
    assert_equals_reference(OP, "torch", halves, torch.device("cpu"), torch.bfloat16)


def published(k: torch.Tensor, v: torch.Tensor, w: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The two sums at every position, as they stand in the paper."""
    t = torch.arange(k.shape[1])
    age = (t[:, None] - 1 - t).clamp(min=0)
    weights = torch.exp(-age[..., None] * w + k[:, None]) * (t[:, None] > t)[..., None]  # (batch, t, i, channels)
    now = torch.exp(u + k)
    return ((weights * v[:, None]).sum(2) + now * v) / (weights.sum(2) + now)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("size", [1, 80])
def test_is_the_published_average(backend: str, size: float) -> None:
    values = [value.double().requires_grad_() for value in drawn("m", 2, 30, 4, size)[:4]]
    (found, _), expected = wkv(*values, backend=backend), published(*values)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), values),
        torch.autograd.grad((expected * weight).sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [1, 80])
def test_steps_are_the_scan(size: float) -> None:
    arguments = drawn("n", 2, 50, 5, size)
    k, v, w, u = arguments[:4]
    expected, final = wkv(k, v, w, u)
    state = empty_state(2, 5, torch.float32, "cpu")
    found = torch.stack([wkv_update_(state, k[:, t], v[:, t], w, u) for t in range(50)], dim=1)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    # the exponents' roundings differ, and the sums make up for them
    one, other = (s[:, :2].double() * torch.exp(s[:, 2:].double()) for s in (state, final))
    torch.testing.assert_close(one, other, rtol=2e-5, atol=0)


def test_wrong_shapes_are_refused() -> None:
    k, v, w, u = drawn("o", 2, 4, 3)[:4]
    for bad in ((k, v[:, 1:], w, u), (k, v, w[1:], u), (k[0], v[0], w, u)):
        with pytest.raises(ValueError, match="must"):
            wkv(*bad)
    with pytest.raises(ValueError, match="initial_state"):
        wkv(k, v, w, u, initial_state=torch.zeros(2, 3))
