"""Laws 2, 3 and 4 for every registered mixer: registering one is what gets it tested."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mixers.variants import CASES, COMPILED
from torch.export import Dim, export

from mambaseq.checking.laws import check_future, check_given_state, check_ways_to_run, close, tensors
from mambaseq.domain import catalog
from mambaseq.mixers.base import Mixer, State

D_MODEL = 12


def make(name: str, options: dict) -> Mixer:
    torch.manual_seed(0)
    made = catalog()["mixers"].get(name)(D_MODEL, **options)
    assert isinstance(made, Mixer)
    return made


@pytest.mark.parametrize(("name", "options"), CASES)
def test_full_chunked_stepped_and_packed_agree(name: str, options: dict) -> None:
    check_ways_to_run(make(name, options), D_MODEL)


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
    check_future(mixer, D_MODEL)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_given_state_is_not_changed_and_forks_are_apart(name: str, options: dict) -> None:
    check_given_state(make(name, options), D_MODEL)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_cross_chunks(name: str, options: dict) -> None:
    """A gradient that is a lone number may be nearly nothing beside the terms of its sum, as that of Mamba-2's D, whose
    scale the norm behind it takes away: such are held to the law in float64."""
    mixer = make(name, options)
    x = torch.randn(2, 30, D_MODEL)
    weight = torch.randn(2, 30, D_MODEL)

    def gradients(of: torch.nn.Module, dtype: torch.dtype, chunks: list[int]) -> list[torch.Tensor]:
        leaf = x.to(dtype).requires_grad_()
        state, parts = None, []
        for part in leaf.split(chunks, dim=1):
            y, state = of(part, state=state, return_state=True)
            parts.append(y)
        loss = (torch.cat(parts, 1) * weight.to(dtype)).sum()
        return list(torch.autograd.grad(loss, [leaf, *of.parameters()]))

    def check(of: torch.nn.Module, dtype: torch.dtype, lone: bool) -> None:
        for whole, chunked in zip(gradients(of, dtype, [30]), gradients(of, dtype, [13, 17]), strict=True):
            if (whole.numel() == 1) == lone:
                close(chunked, whole, tolerance=1e-5)

    check(mixer, torch.float32, lone=False)
    if any(parameter.numel() == 1 for parameter in mixer.parameters()):
        check(copy.deepcopy(mixer).double(), torch.float64, lone=True)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_selected_states_are_those_of_their_sequences(name: str, options: dict) -> None:
    mixer = make(name, options)
    x, more = torch.randn(3, 8, D_MODEL), torch.randn(3, 4, D_MODEL)
    with torch.no_grad():
        _, state = mixer(x, return_state=True)
        order = torch.tensor([2, 0, 2])
        close(mixer(more, state=state.select(order)), mixer(torch.cat([x[order], more], 1))[:, 8:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["state", "input"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_is_not_finite_stays_in_its_sequence(name: str, options: dict, place: str, bad: float) -> None:
    """One of a batch, in a step and in more positions, keeps all bits of the others. Packed, where sums over a whole
    row may be rounded by what stands before, none of the others is lost."""
    mixer = make(name, options)
    lengths, spoilt = [3, 70, 1, 20], 1
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()

    def differing(one: State, row: slice, x: torch.Tensor) -> tuple[State, torch.Tensor]:
        one, x = one.clone(), x.clone()
        for tensor in tensors(one) if place == "state" else ():
            if tensor.dtype.is_floating_point or tensor.is_complex():
                tensor[spoilt] = bad
        if place == "input":
            x[row] = bad
        return one, x

    with torch.no_grad():
        _, state = mixer(torch.randn(4, 5, D_MODEL), return_state=True)
        others = [sequence for sequence in range(4) if sequence != spoilt]
        for x in (torch.randn(4, 1, D_MODEL), torch.randn(4, 40, D_MODEL)):
            ends = []
            for one, given in ((state.clone(), x), differing(state, slice(spoilt, spoilt + 1), x)):
                if x.shape[1] == 1:
                    ends.append([mixer.step_(given, one), *tensors(one)])
                else:
                    y, after = mixer(given, state=one, return_state=True)
                    ends.append([y, *tensors(after)])
            for expected, found in zip(*ends, strict=True):
                assert torch.equal(expected[others], found[others])
        x = torch.randn(1, sum(lengths), D_MODEL)
        one, given = differing(state, slice(0, 1), x)
        if place == "input":
            given = x.clone()
            given[:, bounds[spoilt] : bounds[spoilt + 1]] = bad
        ends = [
            [*y[0].split(lengths), after.select(torch.tensor(others))]
            for y, after in (
                mixer(x, state=state, cu_seqlens=bounds, return_state=True),
                mixer(given, state=one, cu_seqlens=bounds, return_state=True),
            )
        ]
        for sequence in others:
            close(ends[1][sequence], ends[0][sequence])
        if mixer.bounded_state:
            for expected, found in zip(tensors(ends[0][-1]), tensors(ends[1][-1]), strict=True):
                close(found, expected)


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
        close(one, other, tolerance=1e-5)


class Adapted(torch.nn.Module):
    """In a linear map's place, as adapters stand: no `nn.Linear`, but with its weight and bias."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.added = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.added(x)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_adapters_in_the_place_of_linear_maps_are_called(name: str, options: dict) -> None:
    adapted = make(name, options)
    merged = copy.deepcopy(adapted)
    for path, layer in list(adapted.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            owner, _, own = path.rpartition(".")
            one = Adapted(layer)
            adapted.get_submodule(owner)._modules[own] = one
            with torch.no_grad():
                merged.get_parameter(f"{path}.weight").add_(one.added.weight)
    x = torch.randn(2, 7, D_MODEL)
    expected = merged(x)
    close(adapted(x), expected, tolerance=1e-4)
    state = adapted.init_state(2, max_length=7)
    close(torch.cat([adapted.step_(x[:, t : t + 1], state) for t in range(7)], 1), expected, tolerance=1e-4)


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if str(case.id).endswith("-0")])
def test_exported_it_serves_any_batch_and_length(name: str, options: dict) -> None:
    """Outputs, states and gradients; what loops over time is one operator of ours."""
    mixer, dynamic = make(name, options), {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {"x": dynamic, "return_state": None}
    program = export(mixer, (torch.randn(2, 9, D_MODEL),), {"return_state": True}, dynamic_shapes=shapes).module()
    for batch, length in ((1, 150), (3, 2)):
        x = torch.randn(batch, length, D_MODEL)
        found = []
        for run, parameters in ((mixer, mixer.parameters()), (program, program.parameters())):
            y, state = run(x, return_state=True)
            ends = [t for t in tensors(state) if t.requires_grad]
            loss = y.square().sum() + sum(t.abs().square().sum() for t in ends)
            found.append([y, *tensors(state), *torch.autograd.grad(loss, list(parameters))])
        for one, other in zip(*found, strict=True):
            close(one, other, tolerance=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_autocast_keeps_states_in_full_precision(name: str, options: dict) -> None:
    mixer = make(name, options)
    x = torch.randn(2, 33, D_MODEL)
    with torch.no_grad():
        expected, state = mixer(x, return_state=True)
        with torch.autocast("cpu", torch.bfloat16):
            y, low = mixer(x, return_state=True)
    close(y.float(), expected, tolerance=3e-2)
    if mixer.bounded_state and tensors(low):  # what grows is kept, not accumulated
        accumulating = list(low.tensors())[-1]
        assert getattr(low, accumulating).dtype == getattr(state, accumulating).dtype
        assert getattr(low, accumulating).dtype in (torch.float32, torch.complex64)
