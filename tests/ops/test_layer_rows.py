"""A step of whole layers of several sequences equals the norm and the block in float64; a row's numbers do not depend
on how many there are, nor on whether kernels begin early."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from agreement import Draw, poisoned_memory, relative_rms_error

from mambaseq.mixers.mamba import Mamba
from mambaseq.mixers.norm import RMSNorm
from mambaseq.ops.decoding import layer_rows, rows
from mambaseq.ops.gpu import nvrtc

# d_model, rows, dtype, of the states
CASES: list[tuple[int, int, torch.dtype, torch.dtype, dict[str, Any]]] = [
    (256, 3, torch.float16, torch.float32, {"d_state": 5, "dt_rank": 3, "d_conv": 3, "conv_bias": False}),
    (768, 70, torch.bfloat16, torch.float32, {}),
    (1024, 9, torch.bfloat16, torch.bfloat16, {}),
]


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    for tuning in (rows.tuning, layer_rows.tuning):
        monkeypatch.setattr(tuning, "untried", True)


@pytest.mark.gpu
@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
def test_a_step_of_a_layer_of_rows(case: Any, cuda: torch.device) -> None:
    d_model, n, dtype, state_dtype, options = case
    torch.manual_seed(0)
    draw, mixer, norm = Draw(str(case)), Mamba(d_model, **options).eval(), RMSNorm(d_model)
    with torch.no_grad():
        for parameter in (*mixer.parameters(), *norm.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    mixer, norm = mixer.to(dtype), norm.to(dtype)
    stream = draw.normal(n, d_model)
    state = mixer.init_state(n).map(lambda tensor: draw.normal(*tensor.shape)).stored_as(state_dtype)
    exact, expected = copy.deepcopy(mixer).double(), state.map(torch.Tensor.double)
    with torch.no_grad():
        scale = (stream.double().square().mean(1, keepdim=True) + norm.eps).rsqrt()
        y_expected = exact.step_((stream.double() * scale * norm.weight.double())[:, None], expected)[:, 0]
    mixer, norm, state, on_gpu = mixer.to(cuda), norm.to(cuda), state.to(cuda), stream.to(cuda)
    with torch.no_grad():
        assert mixer.can_step_layer(on_gpu, norm, state)
        with poisoned_memory():
            y = mixer.layer_step_(on_gpu, norm, state)
    assert torch.equal(on_gpu.cpu(), stream)
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-11
    assert relative_rms_error(y.cpu().double() - stream, y_expected) <= 3 * unit
    assert relative_rms_error(state.conv.cpu(), expected.conv) <= 2 * unit
    assert relative_rms_error(state.ssm.cpu(), expected.ssm) <= 2 * unit


@pytest.mark.gpu
@pytest.mark.usefixtures("untried")
def test_rows_and_early_starts_change_no_number(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    draw, mixer, norm = Draw("many"), Mamba(768).to(cuda, torch.bfloat16).eval(), RMSNorm(768).to(cuda, torch.bfloat16)
    few = draw.normal(2, 768).to(cuda)
    found = []
    for times, early in ((1, True), (1, False), (40, True)):
        monkeypatch.setattr(layer_rows.tuning, "early", early)
        stream, state = few.repeat(times, 1), mixer.init_state(2 * times)
        with torch.no_grad():
            # with nothing between them: a step must not begin before the states of the last one are there
            for _ in range(20):
                stream = mixer.layer_step_(stream, norm, state)
        found.append((stream, state.conv, state.ssm))
    for one, other, many in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(many, one.repeat(40, *[1] * (one.dim() - 1)))


def test_only_tiles_depend_on_the_rows() -> None:
    for n_out, n_in, tile in ((3072, 768, (4, 4)), (768, 1536, (2, 2)), (8192, 2048, (4, 4))):
        plans = [layer_rows.planned(n_out, n_in, n, tile) for n in (2, 9, 64, 1000)]
        assert None not in plans
        assert len({plan.warps for plan in plans if plan is not None}) == 1
    assert layer_rows.planned(3072, 768, 64, (4, 4)) == layer_rows.Plan(8, 4, 4)
    assert layer_rows.planned(768, 1536, 64, (2, 2)) == layer_rows.Plan(12, 2, 2)
    # a warp cannot hold its part of such a row, or rows and outputs are not of whole tiles
    assert layer_rows.planned(2048, 4096, 64, (2, 2)) is None
    assert layer_rows.planned(768, 100, 64, (2, 2)) is layer_rows.planned(100, 768, 64, (2, 2)) is None


def test_the_kernels_compile() -> None:
    if (reason := nvrtc.why_not()) is not None:
        pytest.skip(reason)
    source = "".join(file.read_text() for file in layer_rows.FILES)
    parts = [
        {"IN": 1, "PART": 1, "WARPS": 8} | layer_rows.norm_macros(768, 1e-5),
        {"IN": 1, "PART": 2, "WARPS": 12} | layer_rows.product_macros(layer_rows.Plan(12, 2, 2), 1536, True),
        {"IN": 2, "PART": 3, "WARPS": 6} | layer_rows.conv_macros(4, 80, False),
    ]
    for macros in parts:
        assert len(nvrtc.compile_to_cubin(source, macros, "90")) > 1000


@pytest.mark.gpu
def test_only_what_was_tried_is_on(cuda: torch.device) -> None:
    norm, mixer = RMSNorm(768).to(cuda, torch.bfloat16), Mamba(768).to(cuda, torch.bfloat16).eval()
    wide = Mamba(768, d_state=32).to(cuda, torch.bfloat16).eval()
    with torch.no_grad():
        for one, n, expected in ((mixer, 2, True), (mixer, 128, True), (mixer, 129, False), (wide, 2, False)):
            assert one.can_step_layer(torch.zeros(n, 768, device=cuda), norm, one.init_state(n)) is expected
