"""States that are kept in bfloat16 between steps: computed with in float32, rounded when they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambaseq.errors import ConfigError
from mambaseq.generation import Decoder, generate
from mambaseq.models import SequenceModel, causal_lm
from mambaseq.ops.decoding import gpu as step_gpu
from mambaseq.ops.decoding import step
from mambaseq.ops.delta_rule import delta_rule_update_
from mambaseq.ops.trapezoid import trapezoidal_update_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels: without a GPU under Triton's interpreter


def make(mixer: str, **options: Any) -> SequenceModel:
    torch.manual_seed(0)
    return causal_lm(vocab_size=29, d_model=16, n_layers=2, mixer=mixer, **options).eval()


def updates() -> dict[str, tuple[tuple[int, ...], Callable[[Any, Tensor], Tensor]]]:
    """By name, the state's shape and the step of a module of ops on a state."""
    torch.manual_seed(0)
    x, dt, z, A = (torch.rand(shape).to(DEVICE) for shape in ((3, 6), (3, 6), (3, 6), (6, 5)))
    B, C, heads, D = (torch.randn(shape).to(DEVICE) for shape in ((3, 1, 5), (3, 1, 5), (3, 2, 4), (6,)))
    A = -A
    return {
        "selective": ((3, 6, 5), lambda m, s: m.selective_state_update_(s, x, dt, A, B, C, **_of(m, D=D, z=z))),
        "ssd": ((3, 2, 4, 5), lambda m, s: m.ssd_update_(s, heads, dt[:, :2], -dt[0, :2], B, C, **_of(m, D=D[:2]))),
        "lti": ((3, 6, 5), lambda m, s: m.lti_update_(s, x, dt[0], A, A + 1, A, **_of(m, D=D, z=z, rule="zoh"))),
    }


def _of(module: Any, D: Tensor, z: Tensor | None = None, rule: str | None = None) -> dict[str, Any]:
    """The rest of the arguments; the kernels have no defaults."""
    gate: dict[str, Any] = {} if rule is None and z is None else {"z": z}
    given = {"D": D, **gate} | ({} if rule is None else {"discretization": rule})
    if rule is None and module is step_gpu:
        given |= {"dt_bias": None, "dt_softplus": False} | ({"A_is_log": False} if gate else {})
    return given


@pytest.mark.parametrize("module", [step, step_gpu], ids=["torch", "triton"])
@pytest.mark.parametrize("name", ["selective", "ssd", "lti"])
def test_a_step_rounds_the_state_alone(name: str, module: Any) -> None:
    """Triton's interpreter cuts digits off instead."""
    pytest.importorskip("triton")
    shape, update = updates()[name]
    half = torch.randn(shape).to(DEVICE).bfloat16()
    wide = half.float()
    expected = update(step, wide)
    y = update(module, half)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wide, rtol=2**-8 if module is step else 2**-7, atol=0)


def test_steps_of_the_delta_rule_and_of_trapezoids_round_the_state_alone() -> None:
    torch.manual_seed(0)
    one, key, value = torch.rand(2, 3), torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    ranked: dict[str, Any] = {"last_x": value[:, :, None], "last_B": key[:, :, None]}

    def trapezoid(state: Tensor) -> Tensor:
        return trapezoidal_update_(state, value[:, :, None], one, -one, one, key[:, :, None], key[:, :, None], **ranked)

    for update in (lambda state: delta_rule_update_(state, key, key, value, -one, one), trapezoid):
        half = torch.randn(2, 3, 4, 5).bfloat16()
        wide = half.float()
        torch.testing.assert_close(update(half), update(wide))
        assert torch.equal(half, wide.bfloat16())


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("mamba", {}),
        ("mamba2", {"d_state": 8}),
        ("mamba3", {"d_state": 8}),
        ("mamba3", {"d_state": 8, "rank": 4}),
        ("gated_delta", {}),
        ("kda", {}),
        ("gla", {}),
    ],
)
def test_generation_with_rounded_states(mixer: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(mixer, **options)
    seen: list[set[torch.dtype]] = []
    take = Decoder.step

    def watched(decoder: Decoder, token: Tensor) -> Any:
        told = take(decoder, token)
        seen.append({tensor.dtype for layer in decoder.state for tensor in layer.tensors().values()})
        return told

    monkeypatch.setattr(Decoder, "step", watched)
    prompt = torch.randint(29, (2, 6))
    generate(model, prompt, 5, temperature=0)
    whole = seen.copy()
    seen.clear()
    out = generate(model, prompt, 5, temperature=0, state_dtype=torch.bfloat16)
    assert out.shape == (2, 11)
    # what does not add up stays as it is: last inputs, and Mamba-3's angles in float64
    others = {
        tensor.dtype for s in model.init_state(1) for name, tensor in s.tensors().items() if name not in s.accumulated
    }
    assert all(dtypes == {torch.bfloat16} | others for dtypes in seen)
    assert all(dtypes == {torch.float32} | others for dtypes in whole)


@pytest.mark.parametrize(
    ("mixer", "options", "dtype", "told"),
    [
        ("mamba", {}, torch.float16, "torch.bfloat16"),
        ("attention", {}, torch.bfloat16, "has none"),
        ("mamba", {"lti": True}, torch.bfloat16, "has none"),  # of complex numbers
    ],
)
def test_what_cannot_be_rounded_is_refused(mixer: str, options: dict[str, Any], dtype: torch.dtype, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        generate(make(mixer, **options), torch.zeros(1, 3, dtype=torch.long), 2, state_dtype=dtype)
