"""Mixers on a GPU: the ways to run them agree, compiled too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixers.variants import CASES
from torch import Tensor

from mambaseq.domain import catalog
from mambaseq.mixers import mamba
from mambaseq.ops.blocks.mamba import mamba_block
from mambaseq.ops.selective_scan import segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("full_precision"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]
# beside what holds everywhere: states in two pieces, the other implementations, widths that kernels like
CASES = CASES + [
    pytest.param(name, options, id=f"{name}-gpu-{i}")
    for i, (name, options) in enumerate(
        [
            ("mamba", {"d_state": 20}),
            ("attention", {"n_heads": 6, "n_kv_heads": 2, "window": 50}),
            ("hyena", {"l_max": 300}),
            ("h3", {"head_dim": 2}),
            ("s4", {"mode": "fft"}),
        ]
    )
]
DEFAULTS = [case for case in CASES if case.values[1] == {}]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not (expected.is_floating_point() or expected.is_complex()):
        assert torch.equal(actual, expected)
        return
    assert (actual.detach() - expected.detach()).norm() <= 1e-4 * expected.detach().norm()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_full_chunked_stepped_and_packed_agree(name: str, options: dict) -> None:
    torch.manual_seed(0)
    mixer = catalog()["mixers"].get(name)(48, **options).cuda()
    x = torch.randn(2, 300, 48, device="cuda")
    with torch.no_grad():
        full, last = mixer(x, return_state=True)
        first, state = mixer(x[:, :170], return_state=True)
        second, state = mixer(x[:, 170:], state=state, return_state=True)
        close(torch.cat([first, second], 1), full)
        stepped = mixer.init_state(2)
        close(torch.cat([mixer.step_(x[:, t : t + 1], stepped) for t in range(300)], 1), full)
        if mixer.bounded_state:
            for one, other, whole in zip(*(list(s.tensors().values()) for s in (state, stepped, last)), strict=True):
                close(one, whole)
                close(other, whole)
        bounds = torch.tensor([0, 1, 1, 200, 300], dtype=torch.int32, device="cuda")
        packed = mixer(x[:1], cu_seqlens=bounds)
        for begin, end in ((0, 1), (1, 200), (200, 300)):
            close(packed[:, begin:end], mixer(x[:1, begin:end]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("name", "options"), [*DEFAULTS, ("mamba", {"lti": True}), ("mamba", {"complex": True})])
def test_compiled_equals_eager(name: str, options: dict, backend: str) -> None:
    torch.manual_seed(0)
    mixer = catalog()["mixers"].get(name)(48, **options).cuda()
    x = torch.randn(2, 300, 48, device="cuda", requires_grad=True)
    torch._dynamo.reset()
    results = []
    for run in (mixer, torch.compile(mixer, fullgraph=True, backend=backend)):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    for compiled, eager in zip(results[1], results[0], strict=True):
        close(compiled, eager)


@pytest.mark.parametrize("narrow", [0, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_read_as_they_are(
    dtype: torch.dtype, narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as from their copies in float32."""
    monkeypatch.setattr(segments, "narrow_states", lambda *shape: narrow)
    torch.manual_seed(0)
    mixer = mamba.Mamba(40).cuda().to(dtype)
    x = torch.randn(2, 300, 40, device="cuda", dtype=dtype, requires_grad=True)
    own = mixer._block_arguments(x, None, None, True)
    wide = own._replace(A_log=own.A_log.float(), D=own.D.float(), dt_bias=own.dt_bias.float())
    for one, other in zip(*(outputs_and_gradient(whole) for whole in (own, wide)), strict=True):
        assert torch.equal(one, other)


def outputs_and_gradient(whole: Any) -> list[Tensor]:
    outputs = mamba_block(whole)
    return [*outputs, *torch.autograd.grad(outputs[0].float().square().sum(), [whole.x])]


PACKED = [0, 1, 1, 200, 300]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_state": 5, "bias": True},
        {"d_conv": 2, "conv_bias": False},
        {"complex": True},
        {"complex": True, "d_state": 5, "bias": True},
        {"lti": True},
        {"lti": True, "lti_complex": False, "d_state": 3, "bias": True},
    ],
)
def test_the_block_as_one_equals_its_ops(
    options: dict, stateful: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = mamba.Mamba(40, **options).cuda()
    x = torch.randn(1 if packed else 2, 300, 40, device="cuda", requires_grad=True)
    bounds = torch.tensor(PACKED, dtype=torch.int32, device="cuda") if packed else None
    state = mixer.init_state(4 if packed else 2).map(lambda t: torch.randn_like(t).requires_grad_())
    cotangents = [torch.randn_like(x), torch.randn_like(state.conv), torch.randn_like(state.ssm)]
    inputs = [x, *mixer.parameters(), *([state.conv, state.ssm] if stateful else [])]

    def run() -> list[Tensor]:
        if not stateful:
            y = mixer(x, cu_seqlens=bounds)
            return [y, *torch.autograd.grad(y, inputs, cotangents[0])]
        y, new = mixer(x, state=state, cu_seqlens=bounds, return_state=True)
        outputs = [y, new.conv, new.ssm]
        return [*outputs, *torch.autograd.grad(outputs, inputs, cotangents)]

    called = []
    name, why_not = ("lti_block", "why_not_whole_lti") if mixer.lti else ("mamba_block", "why_not_whole")
    whole = getattr(mamba, name)
    monkeypatch.setattr(mamba, name, lambda arguments: called.append(1) or whole(arguments))
    fused = run()
    assert called
    monkeypatch.setattr(mamba, why_not, lambda arguments: "not in this test")
    for one, ops in zip(fused, run(), strict=True):
        close(one, ops)
    assert len(called) == 1


KINDS: list[dict] = [{}, {"lti": True}, {"complex": True}]


@pytest.mark.parametrize("options", KINDS)
def test_the_block_as_one_under_autocast(options: dict) -> None:
    mixer = mamba.Mamba(64, **options).cuda()
    x = torch.randn(2, 500, 64, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)

    def run(dtype: torch.dtype | None) -> list[Tensor]:
        with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            y = mixer(x)
        assert y.dtype == (dtype or torch.float32)
        inputs = [x, *mixer.parameters()]
        gradients = torch.autograd.grad(y, inputs, dy.to(y.dtype))
        assert [gradient.dtype for gradient in gradients] == [value.dtype for value in inputs]
        return [y, *gradients]

    exact = run(None)
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        for half, full in zip(run(dtype), exact, strict=True):
            assert (half.float() - full).norm() <= limit * full.norm()


@pytest.mark.parametrize("options", KINDS)
def test_the_block_twice_gives_the_same_bits(options: dict) -> None:
    mixer = mamba.Mamba(64, **options).cuda()
    x = torch.randn(2, 700, 64, device="cuda", requires_grad=True)
    runs = [torch.autograd.grad(mixer(x).sum(), [x, *mixer.parameters()]) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_wrapped_layer_is_not_passed_by() -> None:
    mixer = mamba.Mamba(64).cuda()
    x = torch.randn(1, 50, 64, device="cuda")
    before = mixer(x)
    mixer.x_proj.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert not torch.equal(mixer(x), before)
