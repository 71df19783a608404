"""The steps of whole layers on GPUs equal the norm, the block and the sum in float64; without a GPU their kernels run
under Triton's interpreter."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from agreement import Draw, poisoned_memory, relative_rms_error

from mambaseq.mixers.mamba import Mamba
from mambaseq.mixers.mamba2 import Mamba2
from mambaseq.mixers.norm import RMSNorm
from mambaseq.ops.decoding import layer

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# three roundings on the way; the interpreter cuts bf16 off instead
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7 if DEVICE == "cuda" else 2**-6}
MIXERS: dict[str, Any] = {
    "mamba": lambda **more: Mamba(40, 5, dt_rank=3, **more),
    "mamba2": lambda **more: Mamba2(24, d_state=6, head_dim=16, **more),
}


@pytest.mark.parametrize(("biased", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("name", MIXERS)
def test_a_layer(name: str, biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(layer.tuning, "programs", 4)  # each takes a millisecond there
    torch.manual_seed(0)
    draw = Draw(f"{name} {biased}")
    mixer = MIXERS[name](bias=biased, d_conv=3 + biased).to(dtype)
    norm = RMSNorm(mixer.d_model, eps=1e-3).to(dtype)
    with torch.no_grad():
        for parameter in (*mixer.parameters(), *norm.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    residual = 3 * draw.normal(1, mixer.d_model)
    state = mixer.init_state(1).map(lambda tensor: draw.normal(*tensor.shape))
    exact = copy.deepcopy(mixer).double()  # of the rounded numbers
    expected_state = state.map(lambda tensor: tensor.double())
    with torch.no_grad():
        normed = torch.nn.functional.rms_norm(residual.double(), (mixer.d_model,), norm.weight.double(), norm.eps)
        expected = exact.step_(normed[:, None], expected_state)[:, 0]
    mixer = mixer.to(DEVICE)
    residual, state, norm = residual.to(DEVICE), state.map(lambda tensor: tensor.to(DEVICE)), norm.to(DEVICE)
    places = [tensor.data_ptr() for tensor in state.tensors().values()]
    before = residual.clone()
    with poisoned_memory(), torch.no_grad():
        total = mixer.layer_step_(residual, norm, state)
    assert total.dtype == torch.float32
    assert torch.equal(residual, before)
    assert relative_rms_error((total - residual).cpu(), expected) <= TOLERANCE[dtype]
    assert [tensor.data_ptr() for tensor in state.tensors().values()] == places
    for key, tensor in state.tensors().items():
        assert relative_rms_error(tensor.cpu(), getattr(expected_state, key)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", MIXERS)
def test_cpu_tensors_are_left_to_the_cpu(name: str) -> None:
    mixer = MIXERS[name]()
    with torch.no_grad():
        assert not mixer.can_step_layer(torch.zeros(1, mixer.d_model), RMSNorm(mixer.d_model), mixer.init_state(1))
