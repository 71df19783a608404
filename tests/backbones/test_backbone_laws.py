"""Laws 2 and 3 for every registered causal backbone: registering one is what gets it tested."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from backbones.stand_ins import Attends, TinyMLP

from mambaseq.backbones.base import Backbone
from mambaseq.checking.laws import check_given_state
from mambaseq.domain import catalog
from mambaseq.mixers.base import Mixer

D_MODEL = 12
LENGTH = 67
# options, and those of the model's own mixer with its name
VARIANTS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "residual": [
        ({"n_layers": 2}, "mamba"),
        ({"n_layers": 4, "pattern": ["s4d", "mamba*"], "mlp": True}, "s4d"),
        ({"n_layers": 3, "pattern": ["mamba", "attends*"], "norm": "layer"}, "mamba"),
        ({"n_layers": 4, "pattern": ["mamba3", "gated_delta", "kda", "gla*"]}, "mamba"),
    ],
    "unet": [
        ({"n_layers": 1, "pool": [2, 3]}, "mamba"),
        ({"n_layers": 2, "pool": [4], "expand": 1, "pattern": ["mamba", "s4d*"], "mlp": True}, "mamba"),
        ({"n_layers": 1, "pool": [3, 2, 2], "expand": 1, "norm": "layer"}, "s4d"),
        ({"n_layers": 1, "pool": [2, 2], "expand": 1, "tiers": [["mamba"], ["attends"], ["s4d+mlp"]]}, "mamba"),
        (
            {"n_layers": 1, "pool": [2, 2, 2], "expand": 1, "tiers": [["mamba3"], ["gla"], ["gated_delta"], ["kda"]]},
            "mamba",
        ),
    ],
}


def make(name: str, options: dict[str, Any], mixer: str) -> Backbone:
    torch.manual_seed(0)

    def make_mixer(layer: int, name: str = mixer, d_model: int = D_MODEL) -> Mixer:
        stand_in = {"attends": Attends, "mlp": TinyMLP}.get(name)
        kind = catalog()["mixers"].get(name) if stand_in is None else stand_in
        return kind(d_model)

    return catalog()["backbones"].get(name)(make_mixer, **options)


def cases() -> list[Any]:
    found = []
    for entry in catalog()["backbones"]:
        for i, (options, mixer) in enumerate(VARIANTS.get(entry.name, [({}, "mamba")])):
            if make(entry.name, options, mixer).causal:
                found.append(pytest.param(functools.partial(make, entry.name, options, mixer), id=f"{entry.name}-{i}"))
    return found


CASES = cases()
_SLOWLY_COMPILED = ("residual-3", "unet-4")  # mixers that their own tests compile
BOUNDED = [case for case in CASES if all(mixer.bounded_state for mixer in case.values[0]().mixers())]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Relative RMS error."""
    error = (actual.detach() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-30)
    assert error <= tolerance, float(error)


def select(state: list[Any], sequences: list[int]) -> list[Any]:
    return [one.select(torch.tensor(sequences)) for one in state]


def same_states(backbone: Backbone, one: list[Any], other: list[Any]) -> None:
    """Equal outputs of what follows; equal tensors too where none grows."""
    sequences = next(len(tensor) for state in one for tensor in state.tensors().values())
    more = torch.randn(sequences, 13, D_MODEL, generator=torch.Generator().manual_seed(1))
    close(backbone(more, state=one), backbone(more, state=other))
    if all(mixer.bounded_state for mixer in backbone.mixers()):
        for left, right in zip(one, other, strict=True):
            for name, tensor in left.tensors().items():
                close(tensor.to(torch.complex64), getattr(right, name).to(torch.complex64))


@pytest.mark.parametrize("make", CASES)
def test_full_chunked_stepped_and_packed_agree(make) -> None:
    backbone = make()
    x = torch.randn(2, LENGTH, D_MODEL)
    with torch.no_grad():
        full, last = backbone(x, return_state=True)
        assert len(last) == backbone.n_states
        close(backbone(x), full)
        for cuts in ((1, 2, 64), (33, 34), (66, 1), (5, 7, 1, 1, 53), (12, 12, 43)):
            state, parts = None, []
            for part in x.split(cuts, dim=1):
                y, state = backbone(part, state=state, return_state=True)
                parts.append(y)
            close(torch.cat(parts, 1), full)
            same_states(backbone, state, last)
        state = backbone.init_state(2, max_length=LENGTH)
        close(torch.cat([backbone.step_(x[:, t : t + 1], state) for t in range(LENGTH)], 1), full)
        same_states(backbone, state, last)
        bounds = torch.tensor([0, 10, 10, 11, LENGTH], dtype=torch.int32)
        packed, states = backbone(x[:1], cu_seqlens=bounds, return_state=True)
        for number, (begin, end) in enumerate([(0, 10), (10, 10), (10, 11), (11, LENGTH)]):
            if end > begin:
                alone, its_state = backbone(x[:1, begin:end], return_state=True)
                close(packed[:, begin:end], alone)
                same_states(backbone, select(states, [number]), its_state)
        same_states(backbone, select(states, [1]), backbone.init_state(1, max_length=20))


@pytest.mark.parametrize("make", CASES)
def test_sequences_at_different_places_go_on_together(make) -> None:
    backbone = make()
    lengths = [7, 1, 12, 20]
    past = [torch.randn(1, n, D_MODEL) for n in lengths]
    more = torch.randn(4, 15, D_MODEL)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    with torch.no_grad():
        _, states = backbone(torch.cat(past, 1), cu_seqlens=bounds, return_state=True)
        expected = [
            backbone(torch.cat([one, more[i : i + 1]], 1))[0, n:]
            for i, (one, n) in enumerate(zip(past, lengths, strict=True))
        ]
        together, after = backbone(more, state=states, return_state=True)
        close(together, torch.stack(expected))
        order = [2, 0, 2, 3]
        close(backbone(more[order], state=select(states, order)), torch.stack(expected)[order])
        again = [one.clone() for one in states]
        close(torch.cat([backbone.step_(more[:, t : t + 1], again) for t in range(15)], 1), torch.stack(expected))
        same_states(backbone, again, after)
        parts = [more[i, :n] for i, n in enumerate((3, 0, 15, 6))]
        row, cuts = torch.cat(parts)[None], torch.tensor([0, 3, 3, 18, 24], dtype=torch.int32)
        packed = backbone(row, state=states, cu_seqlens=cuts)[0]
        close(packed, torch.cat([one[: len(part)] for one, part in zip(expected, parts, strict=True)]))


@pytest.mark.parametrize("make", CASES)
def test_the_future_is_not_seen(make) -> None:
    backbone = make()
    x = torch.randn(1, 40, D_MODEL)
    with torch.no_grad():
        one = backbone(x)
        for at in (0, 23, 24, 25, 26, 27):
            changed = x.clone()
            changed[:, at, ::2] += 10  # LayerNorm does not see what all channels share
            difference = (backbone(changed) - one).abs()
            # an FFT spreads rounding over all positions: nothing but rounding may differ
            assert difference[:, :at].numel() == 0 or difference[:, :at].max() <= 2e-5
            assert difference[:, at].max() > 1e-3


@pytest.mark.parametrize("make", BOUNDED)
def test_nothing_in_gives_nothing_out(make) -> None:
    backbone = make()
    with torch.no_grad():
        for batch, length in ((0, 5), (2, 0)):
            _, state = backbone(torch.randn(batch, 9, D_MODEL), return_state=True)
            for chunk_length in (None, 2):
                backbone.chunk_length = chunk_length
                for given in (None, state):
                    y, after = backbone(torch.randn(batch, length, D_MODEL), state=given, return_state=True)
                    assert y.shape == (batch, length, D_MODEL)
                    same_states(backbone, after, backbone.init_state(batch) if given is None else state)
                empty = torch.zeros(batch + 1, dtype=torch.int32)
                y, after = backbone(torch.randn(1, 0, D_MODEL), state=state, cu_seqlens=empty, return_state=True)
                assert y.shape == (1, 0, D_MODEL)
                same_states(backbone, after, state)


@pytest.mark.parametrize("make", CASES)
def test_a_given_state_is_not_changed_and_forks_are_apart(make) -> None:
    backbone = make()
    check_given_state(backbone, D_MODEL)
    with torch.no_grad():
        _, state = backbone(torch.randn(1, 9, D_MODEL), return_state=True)
    for run in (backbone, lambda x, state: backbone.step_(x[:, :1], state)):
        with pytest.raises(ValueError, match="states, but was given"):
            run(torch.randn(1, 5, D_MODEL), state=state[:-1])
        with pytest.raises(ValueError, match="is needed"):
            run(torch.randn(3, 5, D_MODEL), state=state)


def gradients(backbone: Backbone, x: torch.Tensor, weight: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    state, parts = None, []
    for part in leaf.split(cuts, dim=1):
        y, state = backbone(part, state=state, return_state=True)
        parts.append(y)
    loss = (torch.cat(parts, 1) * weight).sum()
    return list(torch.autograd.grad(loss, [leaf, *backbone.parameters()]))


@pytest.mark.parametrize("make", CASES)
def test_gradients_cross_chunks(make) -> None:
    backbone = make()
    x, weight = torch.randn(2, 31, D_MODEL), torch.randn(2, 31, D_MODEL)
    whole = gradients(backbone, x, weight, [31])
    for one, other in zip(gradients(backbone, x, weight, [13, 18]), whole, strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("make", BOUNDED)
def test_run_over_chunks_it_is_the_same(make) -> None:
    whole, cut = make(), make()
    cut.chunk_length = 7
    bounds = torch.tensor([0, 5, 5, 24, 31], dtype=torch.int32)
    x, weight = torch.randn(1, 31, D_MODEL), torch.randn(1, 31, D_MODEL)
    for cu_seqlens in (None, bounds):
        found = []
        for backbone in (whole, cut):
            leaf = x.clone().requires_grad_()
            y, state = backbone(leaf, cu_seqlens=cu_seqlens, return_state=True)
            loss = (y * weight).sum() + sum(t.abs().square().sum() for one in state for t in one.tensors().values())
            found.append([y, *torch.autograd.grad(loss, [leaf, *backbone.parameters()])])
        for one, other in zip(*found, strict=True):
            close(one, other, 1e-5)


@pytest.mark.parametrize("make", [case for case in BOUNDED if case.id not in _SLOWLY_COMPILED])
def test_recomputed_and_compiled_layers_are_the_same(make) -> None:
    usual, again = make(), make()
    again.checkpoint = True
    x = torch.randn(2, 19, D_MODEL)
    expected = torch.autograd.grad(usual(x).square().sum(), list(usual.parameters()))
    for one, other in zip(
        torch.autograd.grad(again(x).square().sum(), list(again.parameters())), expected, strict=True
    ):
        close(one, other)
    torch._dynamo.reset()
    compiled = torch.compile(usual, fullgraph=True, backend="aot_eager")
    # tracing gradients takes most of the time: of one variant of each backbone, since those of each mixer, of the norms
    # and of the MLP are traced by their own tests
    name, options, _ = make.args
    with torch.set_grad_enabled(options == VARIANTS.get(name, [({}, "")])[0][0]):
        close(compiled(x), usual(x))
