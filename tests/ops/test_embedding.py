"""The lookup table: its gradient is PyTorch's, and on a GPU it repeats."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mambaseq.encoders import TokenEncoder
from mambaseq.models import causal_lm
from mambaseq.ops import embedding
from mambaseq.ops.dispatch import relative_rms_error
from mambaseq.ops.embedding import Embedding, looked_up

ROWS = [1, 5, 3000]  # by the product and by indexing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 1001)], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("ones", [2**26, 4000])  # the latter: several products
def test_gradient_is_pytorchs(
    rows: int, shape: tuple[int, ...], dtype: torch.dtype, ones: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_ONES", ones)
    torch.manual_seed(0)
    ids = torch.randint(0, rows, shape)
    weight = torch.randn(rows, 6, dtype=dtype, requires_grad=True)
    y = looked_up(ids, weight)
    assert torch.equal(y, nn.functional.embedding(ids, weight))
    direction = torch.randn_like(y)
    y.backward(direction)
    exact = weight.detach().double().requires_grad_()
    nn.functional.embedding(ids, exact).backward(direction.double())
    assert weight.grad is not None
    assert exact.grad is not None
    assert weight.grad.dtype == dtype
    limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert relative_rms_error(weight.grad, exact.grad) < limit


def test_sums_are_not_of_half_precision() -> None:
    """Four thousand ones, each of which a sum in bfloat16 would lose from 256 on."""
    for rows in ROWS:
        weight = torch.zeros(rows, 2, dtype=torch.bfloat16, requires_grad=True)
        looked_up(torch.zeros(4096, dtype=torch.int64), weight).sum().backward()
        assert weight.grad is not None
        assert weight.grad[0].tolist() == [4096, 4096]


@pytest.mark.parametrize("rows", ROWS)
def test_compiles_in_one_graph(rows: int) -> None:
    torch._dynamo.reset()
    ids, weight = torch.randint(0, rows, (2, 50)), torch.randn(rows, 6, requires_grad=True)

    def run(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return looked_up(ids, weight).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(ids, weight), weight), torch.autograd.grad(run(ids, weight), weight)
    )


def test_it_is_an_embedding_to_others() -> None:
    table = TokenEncoder(8, 5).embedding
    assert isinstance(table, nn.Embedding)
    assert [*table.state_dict()] == ["weight"]
    assert torch.equal(copy.deepcopy(table)(torch.tensor([3])), table.weight[3:4])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
@pytest.mark.parametrize("rows", [16, 50_000])
def test_gradient_repeats_on_a_gpu(rows: int) -> None:
    torch.manual_seed(0)
    table = Embedding(rows, 64).cuda()
    ids = torch.randint(0, rows, (32, 1024), device="cuda") ** 2 % rows  # some more often
    direction = torch.randn(32, 1024, 64, device="cuda")
    (expected,) = torch.autograd.grad(table(ids), table.weight, direction)
    for _ in range(10):
        assert torch.equal(torch.autograd.grad(table(ids), table.weight, direction)[0], expected)
    exact = torch.zeros(rows, 64, dtype=torch.float64, device="cuda").index_add(
        0, ids.flatten(), direction.double().flatten(0, 1)
    )
    assert relative_rms_error(expected, exact) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
def test_gradients_of_a_model_repeat_on_a_gpu() -> None:
    torch.manual_seed(0)
    model = causal_lm(16, 64, 2, "mamba").cuda()
    ids = torch.randint(0, 16, (32, 256), device="cuda")
    first = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    for _ in range(5):
        again = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
