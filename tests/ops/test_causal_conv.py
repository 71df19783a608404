"""The first law for the causal convolution: every backend equals the reference, gradients included."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICES, Draw, assert_equals_reference, device_or_skip

from mambaseq.ops import OPS, causal_conv
from mambaseq.ops.causal_conv.arguments import ConvArguments

OP = OPS["causal_conv"]
BACKENDS = [backend.name for backend in OP.backends if backend.name != "reference"]


def full(label: str, batch: int, length: int, channels: int, width: int) -> ConvArguments:
    draw = Draw(label)
    return ConvArguments(
        draw.normal(batch, length, channels),
        draw.normal(channels, width),
        draw.normal(channels),
        "silu",
        draw.normal(batch, channels, width - 1),
    )


def packed(arguments: ConvArguments, *bounds: int) -> ConvArguments:
    state = Draw("states").normal(len(bounds) - 1, arguments.weight.shape[0], arguments.weight.shape[1] - 1)
    return arguments._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32), initial_state=state)


CASES: dict[str, Callable[[], ConvArguments]] = {
    "length 1": lambda: full("a", 3, 1, 65, 4),
    "length 2": lambda: full("b", 2, 2, 130, 4),
    "length 63": lambda: full("c", 2, 63, 65, 3),
    "one channel": lambda: full("d", 2, 63, 1, 4),
    "length 1000": lambda: full("e", 1, 1000, 65, 4),
    "length 4097": lambda: full("f", 1, 4097, 3, 4),
    "length 4097, reverse": lambda: full("g", 1, 4097, 3, 4)._replace(reverse=True),
    "length 0": lambda: full("h", 2, 0, 3, 4),
    "width 1": lambda: full("i", 2, 63, 5, 1),
    "width 7": lambda: full("j", 2, 300, 5, 7)._replace(reverse=True),
    "bare": lambda: ConvArguments(Draw("k").normal(2, 150, 65), Draw("l").normal(65, 4)),
    "packed": lambda: packed(full("m", 1, 200, 65, 4), 0, 0, 1, 3, 66, 66, 194, 200),
    "packed, reverse": lambda: packed(full("n", 1, 200, 65, 4), 0, 2, 130, 200, 200)._replace(reverse=True),
    "packed, no state": lambda: packed(full("o", 1, 70, 3, 4), 0, 30, 70)._replace(initial_state=None),
    "slice": lambda: full("p", 2, 63, 65, 4)._replace(x=Draw("q").normal(2, 63, 130).chunk(2, -1)[1]),
    "time last": lambda: full("r", 2, 63, 65, 4)._replace(x=Draw("s").normal(2, 65, 63).transpose(1, 2)),
}


@functools.cache
def build(case: str, dtype: torch.dtype) -> Callable[[], ConvArguments]:
    @functools.cache
    def arguments() -> ConvArguments:
        made = CASES[case]()
        return made._replace(x=made.x.to(dtype))

    return arguments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_equals_reference(backend: str, case: str, device: str) -> None:
    assert_equals_reference(OP, backend, build(case, torch.float32), device_or_skip(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["length 63", "packed, reverse"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_half_precision(backend: str, case: str, dtype: torch.dtype, device: str) -> None:
    assert_equals_reference(OP, backend, build(case, dtype), device_or_skip(device), dtype)


def test_reference_is_conv1d() -> None:
    x, weight, bias, *_ = (v.double() if torch.is_tensor(v) else v for v in full("conv1d", 2, 20, 5, 4))
    y, final = causal_conv(x, weight, bias, activation="silu", return_final_state=True, backend="reference")
    conv = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=5)
    torch.testing.assert_close(y, F.silu(conv).transpose(1, 2))
    torch.testing.assert_close(final, x[:, -3:].transpose(1, 2))


def test_packed_reference_is_each_sequence_alone() -> None:
    a = packed(full("alone", 1, 20, 5, 4), 0, 2, 2, 9, 20)._replace(reverse=True)
    bounds = [0, 2, 2, 9, 20]
    y, final = OP.backends[-1].run(a)
    for s, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = a._replace(x=a.x[:, start:end], initial_state=a.initial_state[s : s + 1], cu_seqlens=None)
        own_y, own_final = OP.backends[-1].run(own)
        torch.testing.assert_close(y[:, start:end], own_y)
        torch.testing.assert_close(final[s : s + 1], own_final)


def test_gradcheck_of_reference() -> None:
    a = packed(full("gradcheck", 1, 6, 2, 3), 0, 1, 1, 6)
    tensors = [v.double().requires_grad_() for v in (a.x, a.weight, a.bias, a.initial_state)]

    def run(x, weight, bias, state):  # type: ignore[no-untyped-def]
        return OP.backends[-1].run(ConvArguments(x, weight, bias, "silu", state, a.cu_seqlens, True))

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, "x must be"),
        ({"weight": torch.zeros(4, 2)}, "weight must be"),
        ({"bias": torch.zeros(2)}, "bias must be"),
        ({"activation": "relu"}, "activation must be None or 'silu'"),
        ({"initial_state": torch.zeros(1, 3, 2)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([1, 4])}, "rise from 0"),
        ({"x": torch.zeros(1, 4, 3, dtype=torch.float64), "backend": "cpu"}, "x is float64"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    given = {"x": torch.zeros(1, 4, 3), "weight": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=message):
        causal_conv(**(given | change))
