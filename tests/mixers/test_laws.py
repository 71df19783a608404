"""Laws 2, 3 and 4 for every registered mixer: registering one is what gets it tested."""

from __future__ import annotations

import copy

import pytest
import torch
from mixers.variants import CASES, COMPILED

from mambaseq.domain import catalog
from mambaseq.mixers.base import Mixer, State

D_MODEL = 12


def make(name: str, options: dict) -> Mixer:
    torch.manual_seed(0)
    made = catalog()["mixers"].get(name)(D_MODEL, **options)
    assert isinstance(made, Mixer)
    return made


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Relative RMS error; whole numbers are equal."""
    if not (expected.is_floating_point() or expected.is_complex()):
        assert torch.equal(actual, expected)
        return
    error = (actual.detach() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-30)
    assert error <= tolerance, float(error)


def tensors(state) -> list[torch.Tensor]:
    return list(state.tensors().values())


def same_states(mixer: Mixer, one, other) -> None:
    """Equal tensors; where the state grows, and may have room to spare, equal outputs of what follows."""
    if mixer.bounded_state:
        for left, right in zip(tensors(one), tensors(other), strict=True):
            close(left, right)
        return
    sequences = len(tensors(one)[0])
    more = torch.randn(sequences, 5, D_MODEL, generator=torch.Generator().manual_seed(1))
    close(mixer(more, state=one), mixer(more, state=other))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_full_chunked_stepped_and_packed_agree(name: str, options: dict) -> None:
    mixer = make(name, options)
    x = torch.randn(2, 67, D_MODEL)
    with torch.no_grad():
        full, last = mixer(x, return_state=True)
        close(mixer(x), full)
        for cuts in ((1, 2, 64), (33, 34), (66, 1)):
            state, parts = None, []
            for part in x.split(cuts, dim=1):
                y, state = mixer(part, state=state, return_state=True)
                parts.append(y)
            close(torch.cat(parts, 1), full)
            same_states(mixer, state, last)
        state = mixer.init_state(2, max_length=67)
        close(torch.cat([mixer.step_(x[:, t : t + 1], state) for t in range(67)], 1), full)
        same_states(mixer, state, last)
        bounds = torch.tensor([0, 10, 10, 67], dtype=torch.int32)
        packed, states = mixer(x[:1], cu_seqlens=bounds, return_state=True)
        close(packed[:, :10], mixer(x[:1, :10]))
        second, second_state = mixer(x[:1, 10:], return_state=True)
        close(packed[:, 10:], second)
        same_states(mixer, states.select(torch.tensor([2])), second_state)
        # the empty sequence has seen nothing
        same_states(mixer, states.select(torch.tensor([1])), mixer.init_state(1, max_length=5))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_packed_sequences_go_on_from_their_states(name: str, options: dict) -> None:
    mixer = make(name, options)
    x = torch.randn(1, 20, D_MODEL)
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    with torch.no_grad():
        _, states = mixer(x, cu_seqlens=bounds, return_state=True)
        more = torch.randn(1, 9, D_MODEL)
        packed = mixer(more, state=states, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32))
        close(packed[:, :4], mixer(torch.cat([x[:, :7], more[:, :4]], 1))[:, 7:])
        close(packed[:, 4:], mixer(torch.cat([x[:, 7:], more[:, 4:]], 1))[:, 13:])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_nothing_in_gives_nothing_out(name: str, options: dict) -> None:
    mixer = make(name, options)
    with torch.no_grad():
        for shape, bounds in (((0, 5), None), ((2, 0), None), ((1, 0), torch.zeros(3, dtype=torch.int32))):
            y, state = mixer(torch.randn(*shape, D_MODEL), cu_seqlens=bounds, return_state=True)
            assert y.shape == (*shape, D_MODEL)
            assert all(len(tensor) == (shape[0] if bounds is None else 2) for tensor in tensors(state))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_causal_mixers_do_not_see_the_future(name: str, options: dict) -> None:
    mixer = make(name, options)
    assert mixer.causal
    x = torch.randn(1, 40, D_MODEL)
    changed = x.clone()
    changed[:, 25] += 10
    with torch.no_grad():
        one, other = mixer(x), mixer(changed)
    # an FFT spreads rounding over all positions: nothing but rounding may differ
    assert (one[:, :25] - other[:, :25]).abs().max() <= 1e-5
    assert (one[:, 25:] - other[:, 25:]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_given_state_is_not_changed_and_forks_are_apart(name: str, options: dict) -> None:
    mixer = make(name, options)
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 9, D_MODEL), return_state=True)
        before = copy.deepcopy(state)
        for length in (1, 5):
            mixer(torch.randn(1, length, D_MODEL), state=state, return_state=True)
        fork = state.clone()
        mixer.step_(torch.randn(1, 1, D_MODEL), fork)
    for now, then in zip(tensors(state), tensors(before), strict=True):
        assert torch.equal(now, then)
    if tensors(state):
        assert any(not torch.equal(a, b) for a, b in zip(tensors(fork), tensors(state), strict=True))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_cross_chunks(name: str, options: dict) -> None:
    mixer = make(name, options)
    x = torch.randn(2, 30, D_MODEL)
    weight = torch.randn(2, 30, D_MODEL)

    def gradients(chunks: list[int]) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        state, parts = None, []
        for part in leaf.split(chunks, dim=1):
            y, state = mixer(part, state=state, return_state=True)
            parts.append(y)
        loss = (torch.cat(parts, 1) * weight).sum()
        return list(torch.autograd.grad(loss, [leaf, *mixer.parameters()]))

    for whole, chunked in zip(gradients([30]), gradients([13, 17]), strict=True):
        close(chunked, whole, 1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_selected_states_are_those_of_their_sequences(name: str, options: dict) -> None:
    mixer = make(name, options)
    x, more = torch.randn(3, 8, D_MODEL), torch.randn(3, 4, D_MODEL)
    with torch.no_grad():
        _, state = mixer(x, return_state=True)
        order = torch.tensor([2, 0, 2])
        close(mixer(more, state=state.select(order)), mixer(torch.cat([x[order], more], 1))[:, 8:])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_wrong_state_is_refused(name: str, options: dict) -> None:
    mixer = make(name, options)
    x = torch.randn(2, 5, D_MODEL)
    for run in (mixer, lambda x, state: mixer.step_(x[:, :1], state)):
        with pytest.raises(ValueError, match="is needed"):
            run(x, state=State())
        if tensors(mixer.init_state(3)):
            for wrong in (mixer.init_state(3), mixer.init_state(2, device="meta")):
                with pytest.raises(ValueError, match="is needed"):
                    run(x, state=wrong)


@pytest.mark.parametrize(("name", "options"), COMPILED)
def test_compiled_equals_eager(name: str, options: dict) -> None:
    mixer = make(name, options)
    x = torch.randn(2, 19, D_MODEL, requires_grad=True)
    eager, state = mixer(x, return_state=True)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, compiled_state = compiled(x, return_state=True)
    close(y, eager)
    for one, other in zip(tensors(compiled_state), tensors(state), strict=True):
        close(one, other)
    for one, other in zip(
        torch.autograd.grad(y.sum(), list(mixer.parameters())),
        torch.autograd.grad(eager.sum(), list(mixer.parameters())),
        strict=True,
    ):
        close(one, other, 1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_autocast_keeps_states_in_full_precision(name: str, options: dict) -> None:
    mixer = make(name, options)
    x = torch.randn(2, 33, D_MODEL)
    with torch.no_grad():
        expected, state = mixer(x, return_state=True)
        with torch.autocast("cpu", torch.bfloat16):
            y, low = mixer(x, return_state=True)
    close(y.float(), expected, 3e-2)
    if mixer.bounded_state and tensors(low):  # what grows is kept, not accumulated
        accumulating = list(low.tensors())[-1]
        assert getattr(low, accumulating).dtype == getattr(state, accumulating).dtype
        assert getattr(low, accumulating).dtype in (torch.float32, torch.complex64)
