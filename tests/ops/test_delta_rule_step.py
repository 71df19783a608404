"""The GPU's kernel of one step of the delta rule equals PyTorch in float64; without a GPU it is interpreted."""

from __future__ import annotations

import os

import pytest
import torch
from agreement import Draw, calls_of, device_or_skip, poisoned_memory, relative_rms_error

from mambaseq.ops.delta_rule import delta_rule_update_, step

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# from float64 on the same inputs: y is rounded to its dtype (the interpreter cuts bf16 off instead)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 if DEVICE.type == "cuda" else 2**-7, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("decays", [None, "heads", "channels"])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "d_key", "d_value"), [(2, 4, 2, 6, 35), (3, 1, 1, 128, 40), (1, 1, 1, 1, 1)]
)
def test_one_step_on_a_gpu_is_one_kernel(
    batch: int,
    heads: int,
    key_heads: int,
    d_key: int,
    d_value: int,
    delta: bool,
    decays: str | None,
    dtype: torch.dtype,
) -> None:
    draw = Draw(f"step {d_key}")
    q, k = (draw.normal(batch, key_heads, d_key + 3)[..., 3:].to(DEVICE, dtype) for _ in range(2))
    v = draw.normal(batch, heads, d_value).to(DEVICE, dtype)
    beta = draw.uniform(0, 1, heads, batch).T.to(DEVICE) if delta else None
    size = (batch, heads, d_key) if decays == "channels" else (batch, heads)
    g = None if decays is None else -draw.uniform(0, 2, *size).to(DEVICE, dtype)
    kept = draw.normal(batch, heads, d_value, d_key).to(DEVICE)
    for state in (kept, kept.bfloat16()):
        expected_state = state.double()
        wider = [None if value is None else value.double() for value in (q, k, v, g, beta)]
        expected = delta_rule_update_(expected_state, *wider)
        place = state.data_ptr()
        with poisoned_memory():
            y = step.update_on_gpu_(state, q, k, v, g, beta)
        assert state.data_ptr() == place
        assert (y.shape, y.dtype) == (v.shape, v.dtype)
        assert relative_rms_error(y, expected) <= TOLERANCE[dtype]
        assert relative_rms_error(state, expected_state) <= TOLERANCE[state.dtype]


@pytest.mark.gpu
def test_steps_take_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device_or_skip("cuda")
    called = calls_of(monkeypatch, step, "update_on_gpu_")
    k, v = torch.randn(2, 2, 8, device="cuda"), torch.randn(2, 2, 5, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        delta_rule_update_(torch.zeros(2, 2, 5, 8, device="cuda", dtype=dtype), k, k, v)
    delta_rule_update_(torch.zeros(2, 2, 5, 8, device="cuda", dtype=torch.float64), k, k, v)
    assert len(called) == 2
