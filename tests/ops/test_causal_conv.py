"""The first law for the causal convolution: every backend equals the reference, gradients included."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from agreement import (
    DEVICES,
    TOLERANCE,
    Draw,
    assert_equals_reference,
    device_or_skip,
    moved,
    poisoned_memory,
)
from torch import Tensor

from mambaseq.ops import OPS, causal_conv
from mambaseq.ops.causal_conv import gpu
from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.dispatch import outputs_and_gradients, relative_rms_error
from mambaseq.ops.gpu import portable

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
    "width 2": lambda: full("i2", 2, 63, 5, 2),
    "width 2, reverse": lambda: full("i3", 1, 33, 129, 2)._replace(reverse=True),
    "width 8": lambda: full("i8", 1, 33, 5, 8),
    "width 7": lambda: full("j", 2, 110, 5, 7)._replace(reverse=True),
    "bare": lambda: ConvArguments(Draw("k").normal(2, 90, 65), Draw("l").normal(65, 4)),
    "packed": lambda: packed(full("m", 1, 200, 65, 4), 0, 0, 1, 3, 66, 66, 194, 200),
    "packed, reverse": lambda: packed(full("n", 1, 200, 65, 4), 0, 2, 130, 200, 200)._replace(reverse=True),
    "packed, reverse, short": lambda: packed(full("n2", 1, 24, 65, 4), 0, 2, 17, 24, 24)._replace(reverse=True),
    "packed, no state": lambda: packed(full("o", 1, 70, 3, 4), 0, 30, 70)._replace(initial_state=None),
    "packed, shorter than the filter": lambda: packed(full("o2", 1, 40, 3, 8), 0, 0, 1, 3, 9, 9, 16, 17, 40),
    "packed, int64": lambda: packed(full("o3", 1, 9, 3, 4), 0, 4, 9)._replace(
        cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int64)
    ),
    "packed, nothing": lambda: packed(full("o4", 1, 0, 3, 4), 0, 0, 0),
    "packed, width 1": lambda: packed(full("o5", 1, 20, 3, 1), 0, 5, 5, 20),
    "half the final state": lambda: full("o6", 2, 2, 3, 8)._replace(reverse=True),
    "no final state": lambda: full("o7", 2, 40, 5, 4)._replace(wants_final_state=False),
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
@pytest.mark.parametrize("case", [case for case in CASES if case != "packed, reverse, short"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_equals_reference(backend: str, case: str, device: str) -> None:
    if backend == "triton" and device == "cpu" and case.startswith(("length 1000", "length 4097")):
        pytest.skip("Triton's interpreter takes half a minute; a GPU is tested at this length")
    assert_equals_reference(OP, backend, build(case, torch.float32), device_or_skip(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["length 63", "packed, reverse, short"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_half_precision(backend: str, case: str, dtype: torch.dtype, device: str) -> None:
    assert_equals_reference(OP, backend, build(case, dtype), device_or_skip(device), dtype)


@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize(
    ("batch", "length", "blocks"), [(1, 1, 1), (1, 7, 1), (2, 2048, 12), (8, 2048, 16), (33, 2048, 6), (1, 2**20, 4)]
)
def test_runs_divide_a_row(batch: int, length: int, blocks: int, beyond: int) -> None:
    steps, programs = gpu._division(batch, length, blocks, 396, beyond)
    assert (steps + beyond) % gpu._UNROLL == 0
    assert (programs - 1) * gpu._LANES * steps < length <= programs * gpu._LANES * steps


def test_more_programs_than_sums_that_are_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_or_skip("cpu")
    triton_or_skip(device)
    monkeypatch.setattr(gpu, "_ROWS", 16)
    assert_equals_reference(OP, "triton", lambda: full("many", 40, 9, 3, 4), device)


def test_programs_run_at_once_if_they_can() -> None:
    assert gpu._division(8, 2048, 16, 396, 3) == (173, 3)  # 384 programs
    assert gpu._division(1, 65536, 12, 396, 3) == (501, 33)  # 396


def triton_or_skip(device: torch.device) -> None:
    if (reason := portable.why_not(device.type)) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reverse", [False, True])
def test_triton_reads_and_writes_views(reverse: bool, device: str) -> None:
    """As in a block that is differentiated as a whole: x and dx are halves of larger buffers, dy is another's."""
    where = device_or_skip(device)
    triton_or_skip(where)
    draw = Draw("views")
    a = moved(full("views", 2, 45, 20, 4)._replace(reverse=reverse), where)
    xz, dyz = (draw.normal(2, 45, 40).to(where) for _ in range(2))
    a = a._replace(x=xz.chunk(2, -1)[0])
    dy, dfinal = dyz.chunk(2, -1)[1], draw.normal(2, 20, 3).to(where)
    expected = gradients_of_reference(a, dy, dfinal)
    dxz, yz = torch.full_like(xz, 7.0), torch.full_like(xz, 7.0)
    y, final = gpu.forward_into(a, yz.chunk(2, -1)[1])
    dx, *rest = gpu.backward_into(a, dy, dfinal, dxz.chunk(2, -1)[0])
    assert y.data_ptr() == yz.chunk(2, -1)[1].data_ptr()
    assert dx.data_ptr() == dxz.data_ptr()
    for found, e in zip((yz[..., 20:], final, dxz[..., :20], *rest), expected, strict=True):
        assert found is not None
        assert relative_rms_error(found, e) < TOLERANCE[torch.float32]
    assert (dxz[..., 20:] == 7).all()
    assert (yz[..., :20] == 7).all()


@pytest.mark.parametrize("device", DEVICES)
def test_triton_copies_no_view_of_channels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = device_or_skip(device)
    triton_or_skip(where)
    a = moved(full("in place", 2, 20, 20, 4), where)._replace(initial_state=None)
    view = Draw("in place").normal(2, 20, 40).to(where).chunk(2, -1)[0]

    def copied(value: Tensor) -> Tensor:
        assert value.ndim < 3, "a copy was made"
        return value

    monkeypatch.setattr(Tensor, "contiguous", copied)
    gpu.forward_into(a._replace(x=view))
    gpu.backward_into(a._replace(x=view), view)


def gradients_of_reference(a: ConvArguments, dy: Tensor, dfinal: Tensor | None) -> list[Tensor]:
    """y, the final state and the gradients of x, weight, bias and initial_state where they are given, in float64."""
    wide = ConvArguments(
        *(v.double().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in a)
    )
    y, final = OP.backends[-1].run(wide)
    inputs = [v for v in (wide.x, wide.weight, wide.bias, wide.initial_state) if v is not None]
    outputs, cotangents = [y], [dy.double()]
    if dfinal is not None:
        outputs, cotangents = [y, final], [dy.double(), dfinal.double()]
    return [y.detach(), final.detach(), *torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_one_output_alone(backend: str, output: int, device: str) -> None:
    where = device_or_skip(device)
    a = moved(full("alone", 2, 20, 5, 4), where)
    chosen = next(b for b in OP.backends if b.name == backend)
    if (reason := chosen.why_not(a)) is not None:
        pytest.skip(reason)
    found = []
    for run in (chosen.run, OP.backends[-1].run):
        leaves = [v.detach().requires_grad_() for v in (a.x, a.weight, a.bias, a.initial_state)]
        result = run(a._replace(x=leaves[0], weight=leaves[1], bias=leaves[2], initial_state=leaves[3]))[output]
        cotangent = Draw("cotangent").normal(*result.shape).to(where)
        found.append(torch.autograd.grad(result, leaves, cotangent, materialize_grads=True))
    for actual, expected in zip(*found, strict=True):
        assert relative_rms_error(actual, expected) < TOLERANCE[torch.float32]


@pytest.mark.gpu  # the interpreter does one thing after the other
@pytest.mark.parametrize("case", ["length 63", "packed, shorter than the filter"])
def test_triton_twice_the_same_bits(case: str) -> None:
    where = device_or_skip("cuda")
    triton_or_skip(where)
    backend = next(b for b in OP.backends if b.name == "triton")
    arguments = moved(CASES[case](), where)
    first, second = (outputs_and_gradients(backend, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["length 2", "packed, no state", "no final state"])
def test_triton_under_torch_library(case: str, device: str) -> None:
    where = device_or_skip(device)
    if where.type == "cpu" and case != "packed, no state":
        pytest.skip("Triton's interpreter takes seconds for each; a GPU is tested with all")
    triton_or_skip(where)
    given = (
        v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for v in moved(CASES[case](), where)
    )
    torch.library.opcheck(torch.ops.mambaseq.causal_conv_triton.default, tuple(given))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wants", [False, True])
def test_triton_compiled_equals_eager(wants: bool, device: str) -> None:
    where = device_or_skip(device)
    triton_or_skip(where)
    a = moved(full("compiled", 2, 20, 5, 4), where)
    given = {"x": a.x, "weight": a.weight, "bias": a.bias, "initial_state": a.initial_state}
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    found = []
    for call in (causal_conv, torch.compile(causal_conv, fullgraph=True, backend="aot_eager")):
        y, final = call(**leaves, activation="silu", return_final_state=wants, backend="triton")
        loss = (y * y.detach().cos()).sum() + (final**2).sum().to(where)
        found.append([y.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 2, 63, 1000, 4097])
def test_real_sizes(cuda: torch.device, length: int, dtype: torch.dtype) -> None:
    a = moved(full("real", 2, length, 1000, 4), cuda)
    assert_triton_close(a._replace(x=a.x.to(dtype)), dtype)
    halves = Draw("real halves").normal(2, length, 2000).to(cuda, dtype)
    assert_triton_close(a._replace(x=halves.chunk(2, -1)[0], initial_state=None, reverse=True), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes_packed(cuda: torch.device, dtype: torch.dtype, reverse: bool) -> None:
    a = packed(full("real packed", 1, 8192, 777, 4), 0, 0, 1, 3, 70, 1070, 1070, 5167, 8190, 8192, 8192)
    a = moved(a, cuda)._replace(reverse=reverse)
    assert_triton_close(a._replace(x=a.x.to(dtype)), dtype)
    assert_triton_close(a._replace(x=a.x.to(dtype), initial_state=None), dtype)


@pytest.mark.gpu
def test_a_real_batch(cuda: torch.device) -> None:
    a = moved(full("batch", 8, 2048, 2048, 4), cuda)
    assert_triton_close(a._replace(x=a.x.bfloat16(), initial_state=None), torch.bfloat16)


def assert_triton_close(a: ConvArguments, dtype: torch.dtype) -> None:
    draw = Draw("cotangents")
    dy = draw.normal(*a.x.shape).to(a.x.device, dtype)
    dfinal = draw.normal(a.n_sequences, a.x.shape[2], a.weight.shape[1] - 1).to(a.x.device)
    with poisoned_memory():
        found = [*gpu.forward_into(a), *(v for v in gpu.backward_into(a, dy, dfinal) if v is not None)]
    for actual, expected in zip(found, gradients_of_reference(a, dy, dfinal), strict=True):
        assert actual is not None
        assert relative_rms_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_beyond_two_to_the_31_elements(cuda: torch.device, reverse: bool) -> None:
    """The rows whose offsets do not fit 32 bits."""
    length, channels, part = 2**20 + 100, 2048, 200
    x, dy = (torch.randn(1, length, channels, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    small = moved(full("beyond", 1, part, channels, 4), cuda)._replace(initial_state=None, reverse=reverse)
    large = small._replace(x=x)
    y, _ = gpu.forward_into(large)
    dx = gpu.backward_into(large, dy)[0]
    # In reverse the last rows come first in time, and the gradient of those that come later is not theirs alone.
    expected = gradients_of_reference(small._replace(x=x[:, -part:]), dy[:, -part:], None)
    inner = slice(8, -8)
    assert relative_rms_error(y[:, -part:][:, inner], expected[0][:, inner]) < TOLERANCE[torch.bfloat16]
    assert relative_rms_error(dx[:, -part:][:, inner], expected[2][:, inner]) < TOLERANCE[torch.bfloat16]


def test_reference_is_conv1d() -> None:
    x, weight, bias, *_ = (v.double() if torch.is_tensor(v) else v for v in full("conv1d", 2, 20, 5, 4))
    y, final = causal_conv(x, weight, bias, activation="silu", backend="reference")
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
        ({"x": torch.zeros(1, 4, 3, dtype=torch.float64), "backend": "triton"}, "float64"),
        ({"bias": torch.zeros(3, dtype=torch.float64), "backend": "triton"}, "bias is float64"),
        ({"weight": torch.zeros(3, 9), "backend": "triton"}, "wider than 8"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    if change.get("backend") == "triton":
        triton_or_skip(torch.device("cpu"))
    given = {"x": torch.zeros(1, 4, 3), "weight": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=message):
        causal_conv(**(given | change))
