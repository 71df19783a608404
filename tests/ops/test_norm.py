"""The first law for the norms, and the residual stack that is made of them (law 4)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICES, Draw, assert_equals_reference, device_or_skip
from torch import Tensor

from mambaseq.backbones.residual import ResidualStack
from mambaseq.mixers import norm as norm_module
from mambaseq.mixers.mamba import Mamba
from mambaseq.mixers.norm import RMSNorm
from mambaseq.ops import OPS, add_rms_norm, gated_rms_norm
from mambaseq.ops.dispatch import explain, relative_rms_error
from mambaseq.ops.gpu import portable
from mambaseq.ops.norm.arguments import AddNormArguments, GatedNormArguments

ADD, GATED = OPS["add_rms_norm"], OPS["gated_rms_norm"]


def place_or_skip(device: str, backend: str = "triton") -> torch.device:
    """The device, if the backend runs there."""
    place = device_or_skip(device)
    reason = portable.why_not(device) if backend == "triton" else None
    if backend == "cpu" and device != "cpu":
        reason = f"tensors are on {device}"
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return place


def add(label: str, *shape: int) -> AddNormArguments:
    draw = Draw(label)
    return AddNormArguments(draw.normal(*shape), draw.normal(*shape), draw.normal(shape[-1]))


def gated(label: str, *shape: int, **options: Any) -> GatedNormArguments:
    draw = Draw(label)
    return GatedNormArguments(draw.normal(*shape), draw.normal(*shape), draw.normal(shape[-1]), **options)


ADD_CASES: dict[str, Callable[[], AddNormArguments]] = {
    "one row": lambda: add("a", 1, 1, 65),
    "one column": lambda: add("b", 3, 5, 1),
    "odd": lambda: add("c", 2, 63, 65),
    "many rows": lambda: add("d", 3, 411, 7),
    "wide": lambda: add("e", 2, 5, 1500),
    "widest": lambda: add("f", 2, 2, 8192),
    "too wide": lambda: add("g", 2, 2, 8193),
    "no x": lambda: add("h", 2, 63, 65)._replace(x=None),
    "large eps": lambda: add("i", 2, 3, 16)._replace(eps=0.5),
    "rows apart": lambda: add("j", 2, 9, 33)._replace(x=Draw("k").normal(2, 9, 66)[..., 33:]),
    "channels apart": lambda: add("l", 2, 9, 33)._replace(residual=Draw("m").normal(2, 33, 9).transpose(1, 2)),
}
GATED_CASES: dict[str, Callable[[], GatedNormArguments]] = {
    "one row": lambda: gated("a", 1, 1, 65),
    "odd": lambda: gated("b", 2, 63, 65),
    "many rows": lambda: gated("c", 3, 411, 7),
    "groups": lambda: gated("d", 2, 63, 66, group_size=22),
    "many groups": lambda: gated("e", 5, 24, group_size=3, norm_before_gate=True),
    "norm before gate": lambda: gated("f", 2, 63, 65, norm_before_gate=True, eps=0.1),
    "sigmoid": lambda: gated("m", 2, 63, 66, group_size=33, norm_before_gate=True, gate="sigmoid"),
    "sigmoid before norm": lambda: gated("n", 2, 63, 65, gate="sigmoid"),
    "wide": lambda: gated("g", 2, 5, 1500),
    "too wide": lambda: gated("h", 2, 8193),
    "rows apart": lambda: gated("i", 2, 9, 33)._replace(z=Draw("j").normal(2, 9, 66)[..., 33:]),
    "channels apart": lambda: gated("k", 2, 9, 33)._replace(x=Draw("l").normal(2, 33, 9).transpose(1, 2)),
}


@functools.cache
def build(op: str, case: str, **dtypes: torch.dtype) -> Callable[[], Any]:
    @functools.cache
    def arguments() -> Any:
        made = (ADD_CASES if op == ADD.name else GATED_CASES)[case]()
        return made._replace(**{name: getattr(made, name).to(dtype) for name, dtype in dtypes.items()})

    return arguments


def names_of(op: Any) -> list[str]:
    return [backend.name for backend in op.backends]


def test_no_op_takes_the_interpreter_of_kernels_unasked() -> None:
    for op in OPS.values():
        for _, arguments in op.samples(torch.device("cpu")):
            assert next(name for name, reason in explain(op, arguments) if reason is None) != "triton", op.name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ADD_CASES)
@pytest.mark.parametrize("backend", names_of(ADD))
def test_add_equals_reference(backend: str, case: str, device: str) -> None:
    assert_equals_reference(ADD, backend, build(ADD.name, case), device_or_skip(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", GATED_CASES)
@pytest.mark.parametrize("backend", names_of(GATED))
def test_gated_equals_reference(backend: str, case: str, device: str) -> None:
    assert_equals_reference(GATED, backend, build(GATED.name, case), device_or_skip(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low", [("x",), ("x", "weight"), ("residual",), ("x", "residual", "weight")])
@pytest.mark.parametrize("backend", names_of(ADD))
def test_add_in_half_precision(backend: str, low: tuple[str, ...], dtype: torch.dtype, device: str) -> None:
    assert_equals_reference(
        ADD, backend, build(ADD.name, "odd", **dict.fromkeys(low, dtype)), device_or_skip(device), dtype
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low", [("x", "z"), ("x",), ("z", "weight")])
@pytest.mark.parametrize("case", ["groups", "norm before gate", "sigmoid"])
@pytest.mark.parametrize("backend", names_of(GATED))
def test_gated_in_half_precision(
    backend: str, case: str, low: tuple[str, ...], dtype: torch.dtype, device: str
) -> None:
    assert_equals_reference(
        GATED, backend, build(GATED.name, case, **dict.fromkeys(low, dtype)), device_or_skip(device), dtype
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", names_of(ADD))
@pytest.mark.parametrize("used", ["y", "sum"])
def test_either_output_alone_has_gradients(used: str, backend: str, device: str) -> None:
    place = place_or_skip(device, backend)
    x, residual, weight = (v.to(place).requires_grad_() for v in add("alone", 2, 7, 19) if torch.is_tensor(v))
    y, total = add_rms_norm(x, residual, weight, backend=backend)
    if used == "sum":
        total.square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * total.detach())
        torch.testing.assert_close(residual.grad, 2 * total.detach())
    else:
        y.square().sum().backward()
        leaves = [v.detach().double().requires_grad_() for v in (x, residual, weight)]
        F.rms_norm(leaves[0] + leaves[1], (19,), leaves[2], 1e-5).square().sum().backward()
        for value, leaf in zip((x, residual, weight), leaves, strict=True):
            assert relative_rms_error(value.grad, leaf.grad) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", names_of(ADD))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_outputs(dtype: torch.dtype, backend: str, device: str) -> None:
    place = place_or_skip(device, backend)
    x, residual, weight = (v.to(place) for v in add("dtypes", 2, 19) if torch.is_tensor(v))
    y, total = add_rms_norm(x.bfloat16(), residual, weight, out_dtype=dtype, backend=backend)
    assert y.dtype == dtype
    assert total.dtype == torch.float32
    y, total = add_rms_norm(x, residual, weight.to(dtype), backend=backend)
    assert y.dtype == dtype
    y, total = add_rms_norm(None, residual.to(dtype), weight, backend=backend)
    assert (y.dtype, total.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(total, residual.to(dtype).float())


def test_gated_reference_by_hand() -> None:
    x, z, weight = torch.tensor([3.0, 4.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, -1.0, 2.0]), torch.arange(1.0, 5)
    s = z * torch.sigmoid(z)
    u = x * s
    for group, norm in ((None, lambda v: v / (v.square().mean()).sqrt()), (2, None)):
        if norm is None:
            norm = lambda v: torch.cat([h / h.square().mean().sqrt() for h in v.split(2)])  # noqa: E731
        y = gated_rms_norm(x, z, weight, eps=0, group_size=group, backend="reference")
        torch.testing.assert_close(y, norm(u) * weight)
        y = gated_rms_norm(x, z, weight, eps=0, group_size=group, norm_before_gate=True, backend="reference")
        torch.testing.assert_close(y, norm(x) * weight * s)


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_give_the_same_bits(device: str) -> None:
    place = place_or_skip(device)
    for op, arguments in ((ADD, add("bits", 700, 65)), (GATED, gated("bits", 700, 66, group_size=33))):
        tensors = [v.to(place).requires_grad_() for v in arguments if torch.is_tensor(v)]
        triton = next(b for b in op.backends if b.name == "triton")
        runs = [
            torch.autograd.grad(triton.run(arguments._make([*tensors, *arguments[3:]]))[0].square().sum(), tensors)
            for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(2, 3, dtype=torch.int64)}, "residual must be real"),
        ({"x": torch.zeros(2, 4)}, "x must have the shape"),
        ({"weight": torch.zeros(4)}, "weight must be"),
        ({"residual": torch.zeros(2, 3).double(), "backend": "triton"}, "float64|run on a GPU"),
        ({"weight": torch.zeros(3, device="meta")}, "weight is on meta"),
    ],
)
def test_add_arguments_that_do_not_fit(change: dict, message: str) -> None:
    given = {"x": torch.zeros(2, 3), "residual": torch.zeros(2, 3), "weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**(given | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, dtype=torch.int64)}, "x must be real"),
        ({"z": torch.zeros(2, 4)}, "z must have the shape"),
        ({"weight": torch.zeros(4)}, "weight must be"),
        ({"group_size": 4}, "does not divide"),
        ({"group_size": 0}, "does not divide"),
        ({"gate": "tanh"}, "silu.*or.*sigmoid.*tanh"),
    ],
)
def test_gated_arguments_that_do_not_fit(change: dict, message: str) -> None:
    given = {"x": torch.zeros(2, 6), "z": torch.zeros(2, 6), "weight": torch.zeros(6)}
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**(given | change))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_equals_eager(device: str) -> None:
    place = place_or_skip(device)

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, total = add_rms_norm(x, residual, weight, backend="triton")
        y, total = add_rms_norm(None, total + y, weight, out_dtype=torch.bfloat16, backend="triton")
        gated = gated_rms_norm(y, total, weight, group_size=5, backend="triton")
        return gated.float().square().sum() + total.sum()

    tensors = [v.to(place).requires_grad_() for v in add("compiled", 2, 9, 15) if torch.is_tensor(v)]
    torch._dynamo.reset()
    eager, compiled = run, torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [[f(*tensors), *torch.autograd.grad(f(*tensors), tensors)] for f in (eager, compiled)]
    for one, other in zip(*results, strict=True):
        assert relative_rms_error(one.detach(), other.detach()) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_norm_gives_what_the_next_linear_map_would_cast_to(device: str) -> None:
    place = device_or_skip(device)
    norm, x = RMSNorm(9).to(place), torch.randn(2, 9, device=place)
    assert norm(x).dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        y, total = norm(x.bfloat16(), x)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert norm.bfloat16()(x).dtype == torch.bfloat16


def test_the_stream_is_fp32_whatever_a_branch_is() -> None:
    norm, x, branch = RMSNorm(9), torch.randn(2, 9), torch.randn(2, 9, dtype=torch.float64)
    y, total = norm(branch, x)
    assert (y.dtype, total.dtype) == (torch.float32, torch.float32)
    assert torch.equal(total, x + branch.float())


def _unfused(stack: ResidualStack, x: Tensor, states: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, list[Any]]:
    """The definition: x + mixer(norm(x)), the norm of PyTorch."""

    def norm(module: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), module.weight, module.eps)

    new = []
    for index, layer in enumerate(stack.layers):
        old = None if states is None else states[index]
        y, state = layer.mixer(norm(layer.norm, x), state=old, cu_seqlens=cu_seqlens, return_state=True)
        x = x + y
        new.append(state)
    return norm(stack.norm_f, x), new


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_stack_equals_its_definition(
    monkeypatch: pytest.MonkeyPatch, device: str, packed: bool, checkpoint: bool, kernels: bool
) -> None:
    place = place_or_skip(device, "triton" if kernels else "torch")
    stack = ResidualStack(lambda _: Mamba(12, d_state=4), n_layers=3, checkpoint=checkpoint).to(place)
    for module in stack.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.normal_(module.weight)
    if kernels:

        def forward(self: RMSNorm, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
            return add_rms_norm(x, residual, self.weight, eps=self.eps, backend="triton")

        monkeypatch.setattr(norm_module.RMSNorm, "forward", forward)
    cu_seqlens = torch.tensor([0, 4, 11], dtype=torch.int32, device=place) if packed else None
    x = torch.randn(1 if packed else 2, 11, 12, device=place, requires_grad=True)
    cotangent = torch.randn(x.shape, device=place)
    _, states = _unfused(stack, torch.randn_like(x), None, cu_seqlens)
    states = [state.detach() for state in states]
    inputs = [x, *stack.parameters()]
    results = []
    for run in (lambda: stack(x, states, cu_seqlens, True), lambda: _unfused(stack, x, states, cu_seqlens)):
        y, new = run()
        loss = (y * cotangent).sum() + sum(state.ssm.square().sum() for state in new)
        tensors = [value.detach() for state in new for value in state.tensors().values()]
        results.append([y.detach(), *tensors, *torch.autograd.grad(loss, inputs)])
    for fused, defined in zip(*results, strict=True):
        assert relative_rms_error(fused, defined) < (1e-5 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_the_stack_equal_the_whole(device: str) -> None:
    place = device_or_skip(device)
    stack = ResidualStack(lambda _: Mamba(12, d_state=4), n_layers=3).to(place)
    x = torch.randn(2, 7, 12, device=place)
    with torch.no_grad():
        states = stack.init_state(2)
        steps = torch.cat([stack.step_(x[:, t : t + 1], states) for t in range(7)], 1)
        assert relative_rms_error(steps, stack(x)) < (2e-6 if device == "cpu" else 1e-4)


@pytest.mark.gpu
def test_beyond_32_bit_offsets(cuda: torch.device) -> None:
    rows = 2**31 // 1024 + 9
    x = torch.zeros(rows, 1024, dtype=torch.bfloat16, device=cuda)
    x[-9:] = torch.randn(9, 1024, device=cuda).bfloat16()
    weight = torch.ones(1024, device=cuda, requires_grad=True)
    leaf = x.clone().requires_grad_()
    y = gated_rms_norm(leaf, x, weight, backend="triton")
    y.backward(x)
    tail = x[-9:].clone().requires_grad_()
    expected = gated_rms_norm(tail, x[-9:], weight.detach(), backend="reference")
    expected.backward(x[-9:])
    assert relative_rms_error(y[-9:].detach(), expected.detach()) < 4e-3
    assert relative_rms_error(leaf.grad[-9:], tail.grad) < 4e-3
