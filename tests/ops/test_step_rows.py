"""A step of several sequences whose dt_proj, scan and gate are one kernel equals single operations in float64, and a
row's numbers do not depend on how many there are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agreement import Draw, poisoned_memory, relative_rms_error

from mambaseq.mixers.mamba import Mamba
from mambaseq.ops.decoding import rows
from mambaseq.ops.gpu import nvrtc

# d_model, rows, dtype, of the states
CASES: list[tuple[int, int, torch.dtype, torch.dtype, dict[str, Any]]] = [
    (20, 3, torch.bfloat16, torch.float32, {"d_state": 5, "dt_rank": 3, "d_conv": 3, "conv_bias": False}),
    (95, 9, torch.float16, torch.float32, {"d_state": 2, "dt_rank": 9, "d_conv": 2}),
    (768, 70, torch.bfloat16, torch.float32, {}),
    (2048, 5, torch.bfloat16, torch.bfloat16, {}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
def test_a_step_of_rows(case: Any, cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows.tuning, "untried", True)
    d_model, n, dtype, state_dtype, options = case
    torch.manual_seed(0)
    draw, mixer = Draw(str(case)), Mamba(d_model, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mixer = mixer.to(dtype)
    inner = draw.normal(n, 2 * mixer.d_inner).to(dtype)
    state = mixer.init_state(n).map(lambda tensor: draw.normal(*tensor.shape)).stored_as(state_dtype)
    exact, expected = copy.deepcopy(mixer).double(), state.map(torch.Tensor.double)
    exact.in_proj = exact.out_proj = torch.nn.Identity()
    with torch.no_grad():
        y_expected = exact.step_(inner.double()[:, None], expected)[:, 0]
    weights = mixer.to(cuda)._weights()
    inner, state = inner.to(cuda), state.to(cuda)
    with torch.no_grad():
        assert rows.can_step_rows(inner, state.conv, state.ssm, weights)
        with poisoned_memory():
            y = rows.step_rows_(inner, state.conv, state.ssm, weights)
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-11
    assert relative_rms_error(y.cpu(), y_expected) <= 2 * unit
    assert relative_rms_error(state.conv.cpu(), expected.conv) <= 1e-6
    narrow = state_dtype == torch.bfloat16
    assert relative_rms_error(state.ssm.cpu(), expected.ssm) <= (2**-8 if narrow else unit)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_how_many_there_are(cuda: torch.device) -> None:
    draw, mixer = Draw("many"), Mamba(768).to(cuda, torch.bfloat16)
    given = [draw.normal(2, width).to(cuda, torch.bfloat16) for width in (1536, 80, 1536)]
    state = draw.normal(2, 1536, 16).to(cuda)
    many, many_states = [value.repeat(40, 1) for value in given], state.repeat(40, 1, 1)
    assert rows.planned(80, 1536, 16, 132).rows == 4
    with torch.no_grad():
        few = rows.scan_rows_(*given, state, mixer._weights())
        assert torch.equal(rows.scan_rows_(*many, many_states, mixer._weights()), few.repeat(40, 1))
    assert torch.equal(many_states, state.repeat(40, 1, 1))


@pytest.mark.parametrize(("channels", "d_state"), [(1536, 16), (40, 5), (8192, 64), (190, 1)])
def test_only_the_sequences_of_a_block_depend_on_their_number(channels: int, d_state: int) -> None:
    plans = [rows.planned(n, channels, d_state, 132) for n in (1, 2, 8, 64, 1000)]
    assert len({plan.threads for plan in plans}) == 1
    assert all(plan.rows in (1, 2, 4, 8) for plan in plans)
    assert rows.planned(64, 1536, 16, 132) == rows.Plan(4, 4)  # all states are on their way at once


def test_the_kernel_compiles() -> None:
    if (reason := nvrtc.why_not()) is not None:
        pytest.skip(reason)
    for dtype, rank, d_state, half, parts in ((torch.bfloat16, 48, 16, False, 8), (torch.float16, 3, 5, True, 0)):
        macros = rows.macros_of(rows.Plan(4, 2), dtype, rank, d_state, half, parts)
        assert len(nvrtc.compile_to_cubin("".join(file.read_text() for file in rows.FILES), macros, "90")) > 1000


def test_cpu_tensors_are_left_to_the_cpu() -> None:
    mixer = Mamba(16).bfloat16()
    state = mixer.init_state(2)
    with torch.no_grad():
        assert not rows.can_step_rows(torch.zeros(2, 64).bfloat16(), state.conv, state.ssm, mixer._weights())
