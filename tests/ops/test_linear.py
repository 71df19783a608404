"""Linear maps by the faster kernels: equal to PyTorch's, with their gradients."""

from __future__ import annotations

import pytest
import torch
from agreement import calls_of, relative_rms_error
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mambaseq.ops import linear
from mambaseq.ops.linear import apply_linear


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each product by oneDNN."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch is built without oneDNN")
    return calls_of(monkeypatch, linear, "_product")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1031,), (2, 519), (1, 3, 401)])
def test_large_maps(shape: tuple[int, ...], bias: bool, products: list) -> None:
    torch.manual_seed(0)
    module = nn.Linear(700, 903, bias=bias)
    x = torch.randn(*shape, 700, requires_grad=True)
    cotangent = torch.randn(*shape, 903)
    wanted = [x, *module.parameters()]
    y = apply_linear(module, x)
    gradients = torch.autograd.grad(y, wanted, cotangent)
    assert len(products) == 2
    exact = nn.Linear(700, 903, bias=bias).double()
    exact.load_state_dict(module.state_dict())
    x64 = x.detach().double().requires_grad_()
    expected = exact(x64)
    expected_gradients = torch.autograd.grad(expected, [x64, *exact.parameters()], cotangent.double())
    assert relative_rms_error(y, expected) < 1e-6
    for gradient, e in zip(gradients, expected_gradients, strict=True):
        assert relative_rms_error(gradient, e) < 1e-6


def test_slices_and_frozen_parts(products: list) -> None:
    module = nn.Linear(512, 600).requires_grad_(False)
    x = torch.randn(900, 1024)[:, ::2].requires_grad_()
    y = apply_linear(module, x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, module(x))
    torch.testing.assert_close(dx, module.weight.sum(0).expand(900, 512))
    assert len(products) == 2


def test_second_derivatives(products: list) -> None:
    module, x = nn.Linear(512, 600), torch.randn(900, 512, requires_grad=True)
    for apply in (apply_linear, lambda m, x: m(x)):
        (dx,) = torch.autograd.grad(apply(module, x).square().sum(), x, create_graph=True)
        second = torch.autograd.grad(dx.square().sum(), [x, module.weight])
        if apply is apply_linear:
            ours = second
    for a, b in zip(ours, second, strict=True):
        assert relative_rms_error(a, b) < 1e-5
    assert len(products) >= 2


class Quantised(nn.Parameter):
    """A weight that is more than its numbers."""


@pytest.mark.parametrize(
    "change",
    [
        "hook",
        "backward hook",
        "global hook",
        "forward",
        "weight",
        "weight norm",
        "autocast",
        "float64",
        "few",
        "compiled",
    ],
)
def test_left_to_the_module(change: str, products: list, request: pytest.FixtureRequest) -> None:
    module, x = nn.Linear(600, 600), torch.randn(900, 600)
    if change == "hook":
        module.register_forward_hook(lambda *_: torch.zeros(900, 600))
    elif change == "backward hook":
        module.register_full_backward_hook(lambda *_: None)
    elif change == "global hook":
        request.addfinalizer(register_module_forward_hook(lambda *_: torch.zeros(900, 600)).remove)
    elif change == "forward":
        module.forward = lambda x: 0 * x  # type: ignore[method-assign]
    elif change == "weight":
        module.weight = Quantised(module.weight.data)
    elif change == "weight norm":
        with pytest.warns(FutureWarning):
            module = nn.utils.weight_norm(module)
        module.weight_g.data.mul_(2)
    elif change == "float64":
        module, x = module.double(), x.double()
    elif change == "few":
        x = x[:20]
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        expected = module(x)
        function = (
            torch.compile(apply_linear, backend="eager", fullgraph=True) if change == "compiled" else apply_linear
        )
        torch.testing.assert_close(function(module, x), expected)
    assert not products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (5, 3), (48, 131), (768, 66)])
def test_few_rows_each_as_if_it_were_alone(n_in: int, n_out: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(n_in, n_out).to(dtype), torch.randn(8, n_in).to(dtype)
    with torch.no_grad():
        assert linear.can_read_few_rows(x, module.weight)
        assert not linear.can_read_few_rows(torch.zeros(9, n_in, dtype=dtype), module.weight)
        y = apply_linear(module, x)
        expected = nn.functional.linear(x.double(), module.weight.double(), module.bias.double())
        assert relative_rms_error(y, expected) < (1e-6 if dtype == torch.float32 else 4e-3)
        for row in range(8):
            assert torch.equal(apply_linear(module, x[row : row + 1])[0], y[row])
