"""The Mamba-2 block as one operator: as exact as its ops one by one in the same precision, states and packing too."""

from __future__ import annotations

import copy

import pytest
import torch
from agreement import Draw, device_or_skip
from torch import Tensor

from mambaseq.mixers import mamba2
from mambaseq.mixers.mamba2 import Mamba2
from mambaseq.ops.blocks import mamba2 as mamba2_block
from mambaseq.ops.dispatch import relative_rms_error

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton's kernels run, interpreted or not
SMALL = {"d_state": 16, "head_dim": 16}
GPU = [
    {},
    {"n_groups": 2, "bias": True, "norm_before_gate": True},
    {"d_state": 100, "head_dim": 32, "conv_bias": False},
]


def outputs_and_gradients(
    mixer: Mamba2, x: Tensor, state: mamba2.Mamba2State | None, bounds: Tensor | None
) -> list[Tensor]:
    """Output, new states and all gradients, for fixed cotangents."""
    x = x.detach().requires_grad_()
    inputs = [x, *mixer.parameters()]
    if state is None:
        outputs = [mixer(x, cu_seqlens=bounds)]
    else:
        state = state.map(lambda t: t.detach().requires_grad_())
        inputs += [state.conv, state.ssm]
        y, new = mixer(x, state=state, cu_seqlens=bounds, return_state=True)
        outputs = [y, new.conv, new.ssm]
    draw = Draw("cotangents")
    cotangents = [draw.normal(*o.shape).bfloat16().to(o.device, o.dtype) for o in outputs]
    return [o.detach() for o in (*outputs, *torch.autograd.grad(outputs, inputs, cotangents))]


def made(width: int, length: int, stateful: bool, packed: bool, options: dict) -> tuple:
    torch.manual_seed(0)
    mixer = Mamba2(width, **options).to(PLACE)
    x = Draw("x").normal(1 if packed else 2, length, width).bfloat16().to(PLACE)
    bounds = torch.tensor([0, 1, 1, length // 3, length], dtype=torch.int32, device=PLACE) if packed else None
    state = None
    if stateful:
        state = mixer.init_state(4 if packed else 2).map(lambda t: Draw("state").normal(*t.shape).to(PLACE))
    return mixer, x, state, bounds


def check(mixer: Mamba2, x: Tensor, state: mamba2.Mamba2State | None, bounds: Tensor | None, monkeypatch) -> None:
    exact = copy.deepcopy(mixer).double()
    exact.backend = "torch"
    wide = None if state is None else state.map(torch.Tensor.double)
    expected = outputs_and_gradients(exact, x.double(), wide, bounds)
    called = []
    whole = mamba2.mamba2_block
    monkeypatch.setattr(mamba2, "mamba2_block", lambda arguments: called.append(1) or whole(arguments))
    monkeypatch.setattr(mamba2, "_runs_whole", lambda x: True)
    with torch.autocast(x.device.type, torch.bfloat16):
        fused = outputs_and_gradients(mixer, x, state, bounds)
        assert called
        monkeypatch.setattr(mamba2, "_runs_whole", lambda x: False)
        one_by_one = outputs_and_gradients(mixer, x, state, bounds)
    assert len(called) == 1
    for index, (a, b, e) in enumerate(zip(fused, one_by_one, expected, strict=True)):
        error = relative_rms_error(a, e)
        assert error <= 2 * relative_rms_error(b, e) + 1e-3, f"{index}: {error}"
        assert error < 0.04


def test_the_block_is_as_exact_as_its_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    check(*made(32, 20, True, True, SMALL), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("options", GPU)
def test_the_block_is_as_exact_as_its_ops_on_a_gpu(
    options: dict, stateful: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_or_skip("cuda")
    check(*made(128, 300, stateful, packed, options), monkeypatch)


@pytest.mark.gpu
def test_compiled_equals_eager_and_both_repeat() -> None:
    device_or_skip("cuda")
    mixer, x, _, _ = made(96, 300, False, False, {})
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    found = []
    with torch.autocast("cuda", torch.bfloat16):
        for run in (mixer, mixer, compiled):
            y = run(x)
            found.append([y, *torch.autograd.grad(y.float().square().sum(), [*mixer.parameters()])])
    for first, second, third in zip(*found, strict=True):
        assert torch.equal(first, second)
        assert relative_rms_error(third, first) < 1e-5


def test_no_memory_is_left_as_it_was_between_rows_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's products of bfloat16 read it there: dx was NaN now and then."""

    def poisoned(shape: tuple[int, int], strides: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full((shape[0] * strides[0],), float("nan"), dtype=dtype).as_strided(shape, strides)

    monkeypatch.setattr(torch, "empty_strided", poisoned)
    mixer, x, _, _ = made(32, 20, False, False, SMALL)
    room = mamba2_block._room(mixer._block_arguments(x.cpu(), None, None, False))
    assert room.stride(0) > room.shape[1]
    assert (room.copy_(torch.ones_like(room)) @ torch.ones(room.shape[1], 32, dtype=room.dtype)).isfinite().all()


def test_gradients_share_no_memory() -> None:
    """What an operator returns must not, and it is compiled on a GPU alone."""
    mixer, x, _, _ = made(32, 5, False, False, SMALL)
    a = mixer._block_arguments(x, None, None, False)
    with torch.no_grad():
        matrices = mamba2_block._matrices(a)
        out, _, _, *kept = mamba2_block._forward(a, matrices, True)
        found = mamba2_block._backward(a, matrices, torch.ones_like(out), None, None, *kept)
    places = [gradient.untyped_storage().data_ptr() for gradient in found if gradient is not None]
    assert len(places) == len(set(places))


def test_a_layer_that_is_hooked_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, *_ = made(32, 5, False, False, SMALL)
    assert mixer._has_plain_layers()
    for name in ("in_proj", "conv1d", "norm", "out_proj"):
        handle = getattr(mixer, name).register_forward_hook(lambda *values: None)
        assert not mixer._has_plain_layers()
        handle.remove()
    assert mixer._has_plain_layers()


def test_what_does_not_run_as_one_says_why() -> None:
    mixer, x, _, _ = made(32, 5, False, False, SMALL)
    arguments = mixer._block_arguments(x.float(), None, None, False)
    assert "bfloat16" in (mamba2.why_not_whole(arguments) or "")
    assert mamba2.why_not_whole(arguments._replace(x=x)) is None
    with pytest.raises(ValueError, match="cannot run these arguments: x is torch"):
        mamba2.mamba2_block(arguments)
