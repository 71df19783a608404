"""Sequences split along time over ranks give what one device gives: outputs, states, the loss and every gradient, for
each causal mixer, packed or not, whole or in chunks."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from ranks import contexts, on_ranks
from torch import Tensor, nn

from mambaseq.backbones.base import Backbone
from mambaseq.domain import catalog
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.growing import GrowingState
from mambaseq.parallel import Part

WIDTH, LENGTH = 12, 13
# in float64; gradients of parameters that a mixer reads in float32 are rounded to it, on each rank
EXACT, ROUNDED = 1e-10, 5e-6
# the second is empty, and the third lies across all ranks; so is the last, behind an end that is a cut of two ranks
BOUNDS = [0, 1, 1, 11, LENGTH, LENGTH]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mamba": [{"d_state": 3}, {"d_state": 3, "lti": True}, {"d_state": 3, "complex": True, "selective_B": False}],
    "mamba2": [{"d_state": 4, "chunk_size": 4}],
    "mamba3": [{"d_state": 4, "rank": 2, "chunk_size": 8}],
    "s4d": [{"d_state": 3}, {"d_state": 3, "mode": "fft", "discretization": "bilinear"}],
    "s4": [{"d_state": 3}],
    "s5": [{"d_state": 4}],
    "lssl": [{"d_state": 4}],
    "lmu": [{"d_state": 4}],
    "h3": [{"d_state": 3}],
    "retention": [{"n_heads": 2, "chunk_size": 4}],
    "linear_attention": [{"n_heads": 2, "chunk_size": 4}],
    "attention": [{"n_heads": 2}, {"n_heads": 2, "window": 3}],
    "hyena": [{"l_max": 40}],
}
CASES = [
    (entry.name, options)
    for entry in catalog()["mixers"]
    if catalog()["mixers"].get(entry.name).causal
    for options in VARIANTS.get(entry.name, [{}])
]


class Layer(nn.Module):
    """Without a norm, which computes in fp32."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Any, residual: Tensor, state: Any, cu_seqlens: Any, return_state: bool) -> Any:
        residual = residual if x is None else residual + x
        y = self.mixer(residual, state=state, cu_seqlens=cu_seqlens, return_state=return_state)
        return (y[0], residual, y[1]) if return_state else (y, residual, None)


class Plain(Backbone):
    splits_time = True

    def __init__(self, mixers: list[Mixer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, mixers))

    def mixers(self) -> list[Mixer]:
        return [layer.mixer for layer in self.layers]  # type: ignore[misc]

    def _run(self, x: Tensor, state: Any, cu_seqlens: Any, return_state: bool) -> Any:
        branch, residual, states = self._through(self.layers, x, state, cu_seqlens, return_state)
        return residual + branch, states

    def init_state(self, *arguments: Any, **options: Any) -> list[Any]:
        return [mixer.init_state(*arguments, **options) for mixer in self.mixers()]

    def step_(self, x: Tensor, state: list[Any]) -> Tensor:
        raise NotImplementedError


@functools.cache
def plain(name: str, options: tuple[tuple[str, Any], ...]) -> Plain:
    torch.manual_seed(0)
    return Plain([catalog()["mixers"].get(name)(WIDTH, **dict(options)) for _ in range(2)]).double()


def history(backbone: Plain, n: int) -> list[Any]:
    """States of n sequences that have seen some positions."""
    with torch.no_grad():
        _, states = backbone(torch.randn(n, 3, WIDTH, dtype=torch.float64), return_state=True)
    return states


def leaves(states: list[Any]) -> list[Any]:
    """The same states, whose tensors have gradients."""
    return [s.map(lambda t: t.detach().clone().requires_grad_(t.dtype != torch.int64)) for s in states]


def told(state: Any, row: int) -> dict[str, Tensor]:
    """What a state says of one of its sequences, without spare room."""
    found = {name: tensor[row] for name, tensor in state.tensors().items()}
    if isinstance(state, GrowingState):
        found |= {name: found[name][: int(state.length[row])] for name in state.rows}
    return found


def objective(y: Tensor, weights: Tensor, states: list[Any], numbers: list[int]) -> Any:
    """A random functional of outputs, and of the states of the sequences with these numbers."""
    total: Any = (weights * y).sum()
    for layer, state in enumerate(states):
        for row, number in enumerate(numbers):
            for name, tensor in told(state, row).items():
                if tensor.dtype != torch.int64:
                    seed = torch.Generator().manual_seed(100 * layer + 10 * number + len(name))
                    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                    total = total + (torch.randn(real.shape, generator=seed, dtype=torch.float64) * real).sum()
    return total


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, name
    if expected.numel():
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error <= tolerance, (name, float(error))


def split_equals_whole(backbone: Plain, size: int, packed: bool, given: bool, **how: Any) -> None:
    torch.manual_seed(1)
    batch = 1 if packed else 2
    bounds = torch.tensor(BOUNDS, dtype=torch.int32) if packed else None
    n = len(BOUNDS) - 1 if packed else batch
    x, weights = torch.randn(2, batch, LENGTH, WIDTH, dtype=torch.float64)
    x.requires_grad_()
    old = leaves(history(backbone, n)) if given else None
    backbone.zero_grad()
    y, final = backbone(x, state=old, cu_seqlens=bounds, return_state=True)
    objective(y, weights, final, list(range(n))).backward()

    copies, ranks = [copy.deepcopy(backbone) for _ in range(size)], contexts(size)

    def on(rank: int) -> tuple[Part, Tensor, Tensor, list[Any], list[Any] | None]:
        context = ranks[rank]
        part = context.split(LENGTH, batch, bounds, **how)
        mine = part.take(x.detach()).requires_grad_()
        begin = None if old is None else leaves([s.select(torch.tensor(part.entering).long()) for s in old])
        copies[rank].zero_grad()
        with part:
            y, final = copies[rank](mine, state=begin, cu_seqlens=part.cu_seqlens(), return_state=True)
        objective(y, part.take(weights), final, part.finished).backward()
        context.sum_gradients(copies[rank].parameters())
        assert mine.grad is not None
        return part, y, mine.grad, final, begin

    assert x.grad is not None
    seen: list[int] = []
    for part, mine, dx, last, begin in on_ranks(size, on):
        close("y", mine, part.take(y), EXACT)
        close("dx", dx, part.take(x.grad), EXACT)
        seen += part.finished
        for layer, state in enumerate(last):
            for row, number in enumerate(part.finished):
                for name, tensor in told(final[layer], number).items():
                    close(f"final {name}", told(state, row)[name], tensor, EXACT)
            for row, number in enumerate(part.entering if begin else []):
                for name, tensor in begin[layer].tensors().items():
                    before = old[layer].tensors()[name].grad
                    if before is not None:
                        close(f"d{name}", tensor.grad[row], before[number], EXACT)
    assert sorted(seen) == list(range(n))
    for one in copies:
        for (name, parameter), other in zip(backbone.named_parameters(), one.parameters(), strict=True):
            if parameter.grad is not None:
                assert other.grad is not None, name
                close(name, other.grad, parameter.grad, ROUNDED)


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{n}" for n, (name, _) in enumerate(CASES)])
def test_outputs_states_and_gradients_are_those_of_one_device(name: str, options: dict[str, Any]) -> None:
    backbone = plain(name, tuple(options.items()))
    split_equals_whole(backbone, 3, packed=False, given=True, lengths=[6, 3, 4])
    split_equals_whole(backbone, 4, packed=True, given=True)
    split_equals_whole(backbone, 2, packed=True, given=False, lengths=[11, 2])
    if all(mixer.bounded_state for mixer in backbone.mixers()):
        split_equals_whole(backbone, 2, packed=True, given=True, chunk_length=4)


@pytest.mark.parametrize(("size", "layers", "checkpoint"), [(2, 9, True), (3, 12, False)])
def test_states_of_several_layers_that_share_a_message_are_those_of_one_device(
    size: int, layers: int, checkpoint: bool
) -> None:
    torch.manual_seed(0)
    mixers = catalog()["mixers"]
    kinds = [("mamba", {"d_state": 3}), ("s4d", {"d_state": 3}), ("mamba3", {"d_state": 4, "chunk_size": 8})]
    made = [mixers.get(name)(WIDTH, **options) for name, options in (kinds * layers)[:layers]]
    backbone = Plain(made).double()
    backbone.checkpoint = checkpoint
    split_equals_whole(backbone, size, packed=False, given=True, chunk_length=2)
    split_equals_whole(backbone, size, packed=True, given=True, chunk_length=2)


GATHERED = [case for case in CASES if plain(case[0], tuple(case[1].items())).mixers()[0].sums_up]
# a convolution of width 1 has no inputs to tell of
GATHERED += [(name, {"d_state": 3, "d_conv": 1}) for name in ("mamba", "mamba2")]


@pytest.mark.parametrize(("name", "options"), GATHERED, ids=[f"{name}-{n}" for n, (name, _) in enumerate(GATHERED)])
def test_ranks_that_run_a_layer_at_once_compute_what_one_device_does(name: str, options: dict[str, Any]) -> None:
    backbone = copy.deepcopy(plain(name, tuple(options.items())))
    backbone.context_states = "gathered"
    split_equals_whole(backbone, 3, packed=False, given=True, lengths=[6, 1, 6])
    split_equals_whole(backbone, 4, packed=False, given=False, lengths=[8, 2, 1, 2])
    split_equals_whole(backbone, 3, packed=True, given=True)
    split_equals_whole(backbone, 4, packed=True, given=False)
    backbone.checkpoint = True
    split_equals_whole(backbone, 2, packed=True, given=False, lengths=[11, 2])
