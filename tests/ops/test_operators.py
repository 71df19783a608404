"""What registers operators: inputs left out, outputs not wanted, what is kept and prepared, eager and compiled."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from agreement import Draw
from torch import Tensor

from mambaseq.ops.blocks.parts import vector, vectors, why_not_cuda, why_not_sizes
from mambaseq.ops.operators import Operator, register


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    wants_sum: bool
    label: str = ""


prepared, kept = [], []


def _prepare(a: Arguments) -> Tensor:
    prepared.append(a)
    return a.weight * 1


def _forward(a: Arguments, weight: Tensor, keep: bool) -> tuple[Tensor | None, ...]:
    y = a.x * weight if a.bias is None else a.x * weight + a.bias
    kept.append(keep)
    return y, y.sum(0) if a.wants_sum else None, y * y if keep else y.new_empty(0)


def _backward(
    a: Arguments, weight: Tensor, dy: Tensor, dsum: Tensor | None, square: Tensor
) -> tuple[Tensor | None, ...]:
    assert square.shape == a.x.shape
    assert a.wants_sum or dsum is None
    dy = dy if dsum is None else dy + dsum
    return dy * weight, (dy * a.x).sum(0), None if a.bias is None else dy.sum(0)


def _fake(a: Arguments, keep: bool) -> tuple[Tensor | None, ...]:
    total = a.x.new_empty(a.x.shape[1]) if a.wants_sum else None
    return a.x.new_empty(a.x.shape), total, a.x.new_empty(a.x.shape if keep else (0,))


SCHEMA = "Tensor x, Tensor weight, Tensor? bias, bool wants_sum"
run = register(
    Operator(
        "of_a_test",
        Arguments,
        SCHEMA,
        ("x", "weight", "bias"),
        _forward,
        _backward,
        _fake,
        kept=1,
        prepare=_prepare,
    )
)


def found(call, has_bias: bool, wants_sum: bool, used: str) -> list[Tensor]:
    values = [Draw(name).normal(*shape).requires_grad_() for name, shape in (("x", (3, 4)), ("w", (4,)), ("b", (4,)))]
    x, weight, bias = values if has_bias else (*values[:2], None)
    y, total = call(Arguments(x, weight, bias, wants_sum))
    loss = {"y": y.cos().sum(), "sum": total.square().sum(), "both": y.cos().sum() + total.square().sum()}[used]
    return [y.detach(), *torch.autograd.grad(loss, values if has_bias else values[:2])]


def plainly(a: Arguments) -> tuple[Tensor, Tensor]:
    y = a.x * a.weight if a.bias is None else a.x * a.weight + a.bias
    return y, y.sum(0) if a.wants_sum else y.new_empty(0)


@pytest.mark.parametrize(
    ("has_bias", "wants_sum", "used"), [(True, True, "both"), (False, True, "sum"), (True, False, "both")]
)
def test_eager_and_compiled_have_autograds_gradients(has_bias: bool, wants_sum: bool, used: str) -> None:
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = found(plainly, has_bias, wants_sum, used)
    for call in (run, compiled):
        for a, e in zip(found(call, has_bias, wants_sum, used), expected, strict=True):
            torch.testing.assert_close(a, e)


def test_what_is_prepared_is_made_once_and_what_is_kept_only_for_gradients() -> None:
    prepared.clear()
    kept.clear()
    x, weight = Draw("x").normal(3, 4).requires_grad_(), Draw("w").normal(4)
    y, total = run(Arguments(x, weight, None, True, "of no matter"))
    (y.sum() + total.sum()).backward(retain_graph=True)
    assert len(prepared) == 1
    first = x.grad.clone()
    y.sum().backward()  # once more through the same graph: it is made again
    assert len(prepared) == 2
    torch.testing.assert_close(x.grad - first, weight.expand(3, 4))
    with torch.no_grad():
        run(Arguments(x, weight, None, True))
    assert kept == [True, False]


def test_operator_is_registered_as_pytorch_wants_it() -> None:
    values = [Draw(name).normal(*shape).requires_grad_() for name, shape in (("x", (3, 4)), ("w", (4,)))]
    torch.library.opcheck(torch.ops.mambaseq.of_a_test.default, (*values, None, True, True))


class Sizes(NamedTuple):
    x: Tensor
    conv: Tensor
    D: Tensor


def test_what_no_block_runs() -> None:
    fits = Sizes(torch.ones(1, 3, 4), torch.ones(4, 1, 4), torch.ones(4))
    assert why_not_sizes(fits) is None
    assert "(1, 0, 4)" in (why_not_sizes(fits._replace(x=torch.ones(1, 0, 4))) or "")
    assert "wider than 8" in (why_not_sizes(fits._replace(conv=torch.ones(4, 1, 9))) or "")
    assert "D is torch.float64" in (why_not_sizes(fits._replace(D=torch.ones(4).double())) or "")
    assert "on cpu" in (why_not_cuda(fits.x) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_vectors_are_widened_as_each_alone(dtype: torch.dtype) -> None:
    draw = Draw("vectors")
    given = [draw.normal(3, 4).to(dtype).t(), torch.nn.Parameter(draw.normal(5).to(dtype)), draw.normal(5)[::2]]
    for one, wide in zip(given, vectors(*given), strict=True):
        assert torch.equal(wide, vector(one))
        assert wide.dtype == torch.float32
        assert wide.is_contiguous()
