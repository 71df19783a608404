"""One step of a whole Mamba block by the kernel: what its layers give one by one, and when it must not run."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from agreement import calls_of, relative_rms_error
from torch import Tensor, nn

from mambaseq.mixers import mamba
from mambaseq.mixers.mamba import Mamba
from mambaseq.ops.cpu import team

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each step that the kernel did."""
    return calls_of(monkeypatch, mamba, "block_step_")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def steps(mixer: Mamba, x: Tensor) -> tuple[Tensor, Any]:
    state = mixer.init_state(len(x))
    return torch.cat([mixer.step_(x[:, t : t + 1], state) for t in range(x.shape[1])], dim=1), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (1, {"d_model": 40}),
        (3, {"d_model": 40, "d_state": 5, "d_conv": 2}),
        (2, {"d_model": 24, "d_state": 40, "d_conv": 1, "bias": True}),
        (1, {"d_model": 300, "conv_bias": False, "bias": True}),
        (4, {"d_model": 1, "dt_rank": 1, "d_state": 1}),
    ],
)
def test_equals_the_whole_sequence(batch: int, options: dict, dtype: torch.dtype, runs: list) -> None:
    torch.manual_seed(0)
    mixer = Mamba(**options)
    for p in mixer.parameters():
        p.add_(0.05 * torch.randn_like(p))
    mixer = mixer.to(dtype)
    x = torch.randn(batch, 12, options["d_model"]).to(dtype)
    expected, expected_state = copy.deepcopy(mixer).double()(x.double(), return_state=True)
    y, state = steps(mixer, x)
    assert len(runs) == 12
    assert y.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    assert relative_rms_error(y, expected) <= limit
    assert relative_rms_error(state.conv, expected_state.conv) <= limit
    assert relative_rms_error(state.ssm, expected_state.ssm) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_steps_whose_states_are_kept(dtype: torch.dtype) -> None:
    mixer = Mamba(40, d_state=5, d_conv=3, bias=True).to(dtype)
    x = torch.randn(1, 9, 40).to(dtype)
    _, state = steps(mixer, x[:, :2])
    before = state.clone()
    y, states = mixer.positions(x[:, 2:], state)  # type: ignore[misc]
    assert torch.equal(state.ssm, before.ssm)
    for t in range(7):
        assert torch.equal(y[:, t : t + 1], mixer.step_(x[:, t + 2 : t + 3], state))
        kept = states.select(torch.tensor([t]))
        assert torch.equal(kept.ssm, state.ssm)
        assert torch.equal(kept.conv, state.conv)
    assert mixer.positions(torch.randn(1, 65, 40).to(dtype), state) is None
    other = Mamba(40, selective_dt=False).to(dtype)
    assert other.positions(x, other.init_state(1)) is None


def test_the_number_of_threads_changes_nothing(threads: None, runs: list) -> None:
    mixer, x = Mamba(300), torch.randn(2, 30, 300)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(steps(mixer, x)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_many_callers_at_once(threads: None, runs: list) -> None:
    torch.set_num_threads(3)
    mixer, x = Mamba(300), torch.randn(4, 1, 30, 300)
    expected = [steps(mixer, sequence)[0] for sequence in x]

    def decode(sequence: Tensor) -> Tensor:
        with torch.no_grad():  # a setting of each thread
            return steps(mixer, sequence)[0]

    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(decode, x))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_changed_parameters_are_seen(runs: list) -> None:
    mixer, other, x = Mamba(40), Mamba(40), torch.randn(1, 4, 40)
    expected = steps(other, x)[0]
    steps(mixer, x)
    mixer.load_state_dict(other.state_dict())
    assert torch.equal(steps(mixer, x)[0], expected)
    mixer.load_state_dict(Mamba(40).state_dict(), assign=True)
    assert not torch.equal(steps(mixer, x)[0], expected)
    for name, p in mixer.named_parameters():
        p.data = other.get_parameter(name).data
    assert torch.equal(steps(mixer, x)[0], expected)
    clone = copy.deepcopy(mixer)
    clone.out_proj.weight.zero_()
    assert steps(clone, x)[0].abs().max() == 0
    assert torch.equal(steps(mixer, x)[0], expected)
    assert len(runs) == 7 * 4


def test_replaced_parameters_are_not_kept(runs: list) -> None:
    mixer = Mamba(40)
    steps(mixer, torch.randn(1, 2, 40))
    storage = weakref.ref(mixer.out_proj.weight.untyped_storage())
    mixer.to(torch.bfloat16)
    gc.collect()
    assert storage() is None
    assert len(runs) == 2


class Adapter(nn.Module):
    """Like those of fine-tuning libraries: shows the layer's weight, computes something else."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


def test_adapters_and_hooks_are_not_bypassed(runs: list) -> None:
    mixer, x = Mamba(40), torch.randn(1, 4, 40)
    expected = steps(mixer, x)[0]
    runs.clear()
    mixer.out_proj = Adapter(mixer.out_proj)  # type: ignore[assignment]
    torch.testing.assert_close(steps(mixer, x)[0], 2 * expected)
    mixer.out_proj = mixer.out_proj.layer  # type: ignore[assignment]
    handle = mixer.in_proj.register_forward_hook(lambda module, inputs, y: 0 * y)
    assert steps(mixer, x)[0].abs().max() == 0
    handle.remove()
    assert not runs
    steps(mixer, x)
    assert len(runs) == 4


def test_left_where_it_cannot_run(runs: list) -> None:
    steps(Mamba(40).double(), torch.randn(1, 2, 40).double())
    steps(Mamba(40), torch.randn(9, 2, 40))
    with torch.autocast("cpu", torch.bfloat16):
        steps(Mamba(40), torch.randn(1, 2, 40))
    half = Mamba(40).to(torch.bfloat16)
    half.A_log.data = half.A_log.data.float()
    steps(half, torch.randn(1, 2, 40, dtype=torch.bfloat16))
    assert not runs


def test_helpers_wake_and_help(threads: None) -> None:
    torch.set_num_threads(3)
    for pause in (0.0, 0.05):  # the second time they are asleep
        time.sleep(pause)
        here, seen, all_here = threading.get_ident(), set(), threading.Barrier(3)

        def kernel(seen: set = seen, barrier: threading.Barrier = all_here) -> None:
            barrier.wait(timeout=20)
            seen.add(threading.get_ident())

        team.run(kernel, 3)
        deadline = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert here in seen
        assert len(seen) == 3
    alone: list[int] = []
    team.run(lambda: alone.append(threading.get_ident()), 1)
    time.sleep(0.05)
    assert alone == [here]
