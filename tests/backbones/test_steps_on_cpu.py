"""A position through residual layers on a CPU, those that follow each other by one kernel."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops.agreement import calls_of, relative_rms_error
from torch import Tensor

from mambaseq.backbones import base
from mambaseq.backbones.residual import ResidualStack
from mambaseq.backbones.unet import UNet
from mambaseq.mixers.attention import Attention
from mambaseq.mixers.mamba import Mamba, MambaState
from mambaseq.mixers.mamba2 import Mamba2
from mambaseq.mixers.mlp import MLP

WIDTH, STEPS = 40, 7
MIXERS: dict[str | None, Any] = {None: Mamba, "mamba": Mamba, "mamba2": Mamba2, "mlp": MLP, "attention": Attention}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each kernel that took layers together."""
    return calls_of(monkeypatch, base, "layers_step_")


def stack(pattern: list[str], dtype: torch.dtype = torch.float32, **options: Any) -> ResidualStack:
    def make(layer: int, name: str | None = None, d_model: int = WIDTH) -> Any:
        return MIXERS[name](d_model, **(options if MIXERS[name] is Mamba else {}))

    made = ResidualStack(make, len(pattern), pattern=pattern, mlp=False)
    for p in made.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return made.to(dtype).eval()


def steps(backbone: Any, x: Tensor) -> tuple[Tensor, list[Any]]:
    state = backbone.init_state(len(x))
    return torch.cat([backbone.step_(x[:, t : t + 1], state) for t in range(x.shape[1])], dim=1), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pattern", "kernels", "options"),
    [
        (["mamba"] * 3, 1, {"bias": True, "d_state": 20}),
        (["mamba", "mamba", "mlp", "mamba"], 2, {"d_conv": 1, "conv_bias": False}),
        (["attention", "mamba2", "mamba"], 1, {}),
    ],
)
def test_equals_the_whole_sequence(
    pattern: list[str], kernels: int, options: dict, dtype: torch.dtype, runs: list
) -> None:
    backbone = stack(pattern, dtype, **options)
    x = torch.randn(3, STEPS, WIDTH).to(dtype)
    given = x.clone()
    y, state = steps(backbone, x)
    assert len(runs) == kernels * STEPS
    assert torch.equal(x, given)
    expected, expected_state = copy.deepcopy(backbone).double()(x.double(), return_state=True)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert y.dtype == dtype
    assert relative_rms_error(y, expected) <= limit
    for one, other in zip(state, expected_state, strict=True):
        if isinstance(one, MambaState):
            assert relative_rms_error(one.conv, other.conv) <= 2 * limit
            assert relative_rms_error(one.ssm, other.ssm) <= 2 * limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_threads_and_known_positions_change_nothing(dtype: torch.dtype, runs: list) -> None:
    backbone, before = stack(["mamba", "mamba", "mlp", "mamba"], dtype), torch.get_num_threads()
    x = torch.randn(8, STEPS, WIDTH).to(dtype)
    y, state = steps(backbone, x)
    try:
        torch.set_num_threads(3)
        assert torch.equal(steps(backbone, x)[0], y)
    finally:
        torch.set_num_threads(before)
    alone, own = steps(backbone, x[2:3])
    assert torch.equal(alone[0], y[2])
    assert torch.equal(own[0].ssm[0], state[0].ssm[2])
    _, begun = steps(backbone, x[2:3, :2])
    first = begun[0].ssm.clone()
    told, kept = backbone.positions(x[2:3, 2:], begun)  # type: ignore[misc]
    assert torch.equal(begun[0].ssm, first)
    if dtype == torch.float32:  # an MLP's products of several positions are others
        torch.testing.assert_close(told, alone[:, 2:], rtol=1e-4, atol=1e-5)
    pure = stack(["mamba"] * 2, dtype)
    _, begun = steps(pure, x[:1, :2])
    told, kept = pure.positions(x[:1, 2:], begun)  # type: ignore[misc]
    alone, own = steps(pure, x[:1])
    assert torch.equal(told, alone[:, 2:])
    assert torch.equal(kept[1].ssm[-1:], own[1].ssm)
    assert torch.equal(kept[1].conv[-1:], own[1].conv)
    assert pure.positions(torch.randn(1, 65, WIDTH).to(dtype), begun) is None


def test_left_to_the_layers(runs: list) -> None:
    backbone, x = stack(["mamba"] * 3), torch.randn(1, STEPS, WIDTH)
    expected = steps(backbone, x)[0]
    runs.clear()
    handle = backbone.layers[1].mixer.in_proj.register_forward_hook(lambda module, inputs, y: y)  # type: ignore[union-attr]
    torch.testing.assert_close(steps(backbone, x)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(runs) == 2 * STEPS
    handle.remove()
    runs.clear()
    handle = backbone.layers[0].norm.register_forward_hook(lambda module, inputs, y: y)  # type: ignore[union-attr]
    steps(backbone, x)
    handle.remove()
    assert len(runs) == STEPS
    runs.clear()
    steps(backbone, torch.randn(9, 1, WIDTH))
    steps(stack(["mamba"], selective_dt=False), x)
    steps(stack(["mamba"]).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        steps(backbone, x)
    assert not runs
    with pytest.raises(ValueError, match=r"state.conv is \(2, 80, 3\)"):
        backbone.step_(x[:, :1], backbone.init_state(2))


def test_layers_at_several_resolutions(runs: list) -> None:
    def make(layer: int, name: str | None = None, d_model: int = WIDTH) -> Any:
        return MIXERS[name](d_model)

    backbone = UNet(make, n_layers=2, pool=[2]).eval()
    x = torch.randn(2, 6, WIDTH)
    expected = backbone(x)
    torch.testing.assert_close(steps(backbone, x)[0], expected, rtol=1e-4, atol=1e-5)
    assert runs
