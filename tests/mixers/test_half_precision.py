"""Parameters of 16 bits on a CPU, with the default dtype that Lightning sets for them (`bf16-true`, `16-true`): every
mixer gives what it gives in 32 bits from the same weights, whole and step by step, and gradients, to their rounding."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from mixers.variants import CASES

from mambaseq.domain import catalog
from mambaseq.generation import generate
from mambaseq.mixers.base import Mixer
from mambaseq.models import build_model

D_MODEL = 12
DTYPES = [torch.bfloat16, torch.float16]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def pair(name: str, options: dict, dtype: torch.dtype) -> tuple[Mixer, Mixer]:
    """A mixer of this dtype, and one of 32 bits with the same weights."""
    torch.manual_seed(0)
    low = catalog()["mixers"].get(name)(D_MODEL, **options).to(dtype)
    return low, copy.deepcopy(low).float()


def close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str = "", least: float = 1e-6
) -> None:
    """Relative RMS error: a few roundings of the dtype. least: the norm that counts for expected values of less."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    error = (actual.detach().to(wide) - expected.detach().to(wide)).norm()
    assert error <= 8 * torch.finfo(dtype).eps * expected.detach().norm().clamp(min=least), (what, float(error))


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")
        for case in CASES
        for dtype in DTYPES
        if dtype == torch.bfloat16 or str(case.id).endswith("-0")
    ],
)
def test_mixers_of_16_bits(name: str, options: dict, dtype: torch.dtype) -> None:
    low, full = pair(name, options, dtype)
    x = torch.randn(2, 21, D_MODEL).to(dtype)
    bounds = torch.tensor([0, 4, 21], dtype=torch.int32)
    dy = torch.randn(2, 21, D_MODEL)
    found = {}
    for mixer in (low, full):
        own = next(mixer.parameters()).dtype
        with default_dtype(own):
            leaf = x.to(own).requires_grad_()
            y, state = mixer(leaf, return_state=True)
            names = [key for key, p in mixer.named_parameters() if p.requires_grad]
            parameters = [p for p in mixer.parameters() if p.requires_grad]
            gradients = torch.autograd.grad((y.float() * dy).sum(), [leaf, *parameters], allow_unused=True)
            packed, states = mixer(x[:1].to(own), cu_seqlens=bounds, return_state=True)
            with torch.no_grad():
                after = [mixer(x[:, :20].to(own), return_state=True)[1]]
                stepped = mixer.step_(x[:, 20:].to(own), after[0])
        assert {y.dtype, packed.dtype, stepped.dtype} == {own}
        found[own] = [y, packed, stepped], [state, states, after[0]], dict(zip(["x", *names], gradients, strict=True))
    (outputs, kept, gradients), (wanted, wanted_states, wanted_gradients) = found[dtype], found[torch.float32]
    for one, other in zip(outputs, wanted, strict=True):
        close(one, other, dtype, "outputs")
    for one, other in zip(kept, wanted_states, strict=True):
        for key, tensor in other.tensors().items():
            if low.bounded_state and tensor.is_floating_point():
                assert getattr(one, key).dtype == tensor.dtype, key  # what accumulates does so in 32 bits
    # a few numbers may be sums that all but cancel
    whole = float(torch.stack([g.norm() for g in wanted_gradients.values() if g is not None]).norm())
    for key, gradient in wanted_gradients.items():
        if gradient is not None:
            close(gradients[key], gradient, dtype, key, least=whole / 100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixer", [entry.name for entry in catalog()["mixers"] if entry.name != "mlp"])
def test_models_of_16_bits_generate(mixer: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = {
        "d_model": 8,
        "encoder": {"name": "tokens", "vocab_size": 7},
        "backbone": {"name": "residual", "n_layers": 1},
        "mixer": {"name": mixer},
        "head": {"name": "lm", "vocab_size": 7},
    }
    model = build_model(spec).to(dtype)
    with default_dtype(dtype):
        tokens = generate(model, torch.tensor([[1, 2, 3]]), 5, seed=0)
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
    assert tokens.shape == (1, 8)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
