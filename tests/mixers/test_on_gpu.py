"""Mixers on a GPU: the ways to run them agree, compiled too."""

from __future__ import annotations

import pytest
import torch

from mambaseq.domain import catalog

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]
CASES = [("mamba", {}), ("mamba", {"d_state": 20}), ("mamba", {"lti": True}), ("s4d", {})]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.detach() - expected.detach()).norm() <= 1e-4 * expected.detach().norm()


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


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
        for one, other, whole in zip(*(list(s.tensors().values()) for s in (state, stepped, last)), strict=True):
            close(one, whole)
            close(other, whole)
        bounds = torch.tensor([0, 1, 1, 200, 300], dtype=torch.int32, device="cuda")
        packed = mixer(x[:1], cu_seqlens=bounds)
        for begin, end in ((0, 1), (1, 200), (200, 300)):
            close(packed[:, begin:end], mixer(x[:1, begin:end]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("name", "options"), CASES)
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
