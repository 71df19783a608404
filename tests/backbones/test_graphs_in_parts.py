"""A captured training step in parts, as several processes have it, is that of one pair of graphs, every bit. On CPUs
the graphs are stand-ins that run what was captured again, in the same memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones.graph_stand_ins import Recorder, stand_in_graphs  # noqa: F401 - a fixture
from torch import Tensor, nn

from mambaseq.backbones import graphed_steps
from mambaseq.backbones.graphed import EAGER_CALLS
from mambaseq.models import SequenceModel, causal_lm

VOCABULARY = 7


# mixers that are run on GPUs, and in how many parts five of them are captured; attention's MLPs are layers, too
ON_A_GPU = {"mamba": 3, "mamba2": 3, "attention": 4}


def make(cuda_graph: bool, layers: int = 9, d_model: int = 8, mixer: str = "mamba", **options: Any) -> SequenceModel:
    torch.manual_seed(0)
    return causal_lm(VOCABULARY, d_model, layers, mixer, cuda_graph=cuda_graph, **options).train()


def data(step: int, device: torch.device | str = "cpu", length: int = 11) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(step)).to(device)
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def pairs(model: SequenceModel) -> list[int]:
    """How many pairs each captured step has."""
    return [len(step.pairs) for step in model.backbone.graphs._pairs.values()]


def train(
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    between: Callable[[SequenceModel, int], Any] = lambda model, step: None,
    n_pairs: int = 4,
    device: torch.device | str = "cpu",
    half: bool = False,
    **options: Any,
) -> list[SequenceModel]:
    """Steps of SGD by three models: run as usual, by one pair, in parts. Loss, gradients and weights are the same."""
    models = [make(how, **options).to(device) for how in (False, True, True)]
    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        found = []
        for number, model in enumerate(models):
            monkeypatch.setattr(graphed_steps, "has_others", lambda number=number: number == 2)
            between(model, step)
            model.zero_grad()
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=half):
                loss = model(*data(step, device)).loss
            assert loss is not None
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            kept += [(tensor, tensor.clone()) for tensor in found[-1]]
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.1)
        for other in found[1:]:
            assert len(other) == len(found[0])
            for actual, expected in zip(other, found[0], strict=True):
                assert torch.isfinite(actual).all()
                assert torch.equal(actual, expected), step
    assert all(torch.equal(tensor, then) for tensor, then in kept)  # what was given out is not overwritten
    usual, one, several = models
    assert not pairs(usual)
    assert set(pairs(one)) == {1}
    assert set(pairs(several)) == {n_pairs}
    assert several.backbone.graphs.why_not is None
    assert several.backbone.graphs.replays == one.backbone.graphs.replays > 0
    return models


@pytest.mark.parametrize(
    ("options", "n_pairs"),
    [
        ({}, 4),
        ({"layers": 2}, 2),
        ({"layers": 1}, 1),
        ({"pattern": ["mamba", "mlp"], "layers": 6}, 3),
        ({"mixer": "s4d"}, 4),
        *(({"mixer": mixer, "layers": 5, "d_model": 64}, n_pairs) for mixer, n_pairs in ON_A_GPU.items()),
        ({"pattern": ["mamba*"]}, 1),  # a mixer that layers of several parts share
    ],
    ids=str,
)
def test_steps_in_parts(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], n_pairs: int) -> None:
    models = train(monkeypatch, EAGER_CALLS + 3, n_pairs=n_pairs, **options)
    assert models[2].backbone.graphs.replays == 3


def test_backwards_are_replayed_from_the_last_part_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a part's gradients are there before the part before it begins."""
    monkeypatch.setattr(graphed_steps, "has_others", lambda: True)
    model = make(True)
    for step in range(EAGER_CALLS):
        model(*data(step)).loss.backward()
    came: list[tuple[str, int]] = []
    for name, p in model.backbone.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: came.append((name, len(Recorder.replayed))))
    model(*data(9)).loss.backward()
    assert Recorder.replayed == [0, 1, 2, 3, 4, 5, 6, 7]
    layers = [[8, 7, 6, 5, 4], [3, 2], [1], [0]]  # of 9: half of what is left is a part
    for name, after in came:
        layer = 8 if name.startswith("norm_f") else int(name.split(".")[1])
        assert layer in layers[after - 5], name
    assert len(came) == len(list(model.backbone.parameters()))


def test_a_validation_between_and_frozen_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    def between(model: SequenceModel, step: int) -> None:
        with torch.no_grad():
            before = model.backbone.graphs.replays
            model.eval()(*data(9))
            model.train()(*data(9))
            assert model.backbone.graphs.replays == before
        model.encoder.requires_grad_(step < 4)
        frozen = 0 if step < 8 else 3  # the first part, which then has no gradient at all, and one layer of the next
        for layer in model.backbone.layers[:frozen]:  # type: ignore[index]
            layer.requires_grad_(False)

    models = train(monkeypatch, 12, between)
    assert pairs(models[2]) == [4, 4, 4]
    assert models[2].backbone.graphs.replays == 3 * 2


def test_a_changed_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    def between(model: SequenceModel, step: int) -> None:
        layer: Any = model.backbone.layers[4]
        if step == 4:
            layer.mixer.out_proj.weight = nn.Parameter(layer.mixer.out_proj.weight.detach().clone())
        if step == 8:
            with torch.no_grad():
                layer.mixer.out_proj.weight.mul_(2)

    models = train(monkeypatch, 10, between)
    assert models[2].backbone.graphs.replays == 2 + 4


def test_forwards_before_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two is run as usual; one without a backward blocks nothing."""
    monkeypatch.setattr(graphed_steps, "has_others", lambda: True)
    found = []
    for model in (make(False), make(True)):
        for step in range(EAGER_CALLS):
            model(*data(step)).loss.backward()
        model.zero_grad()
        model(*data(5))
        first = model(*data(6)).loss
        second = model(*data(7)).loss
        first.backward()
        second.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert model.backbone.graphs.replays == 2


def test_gradients_of_some_parameters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other parts keep their activations as long as somebody may ask for them."""
    monkeypatch.setattr(graphed_steps, "has_others", lambda: True)
    found = []
    for model in (make(False), make(True)):
        for step in range(EAGER_CALLS):
            model(*data(step)).loss.backward()
        model.zero_grad()
        loss = model(*data(5)).loss
        last = model.backbone.layers[-1].mixer.out_proj.weight  # type: ignore[union-attr]
        alone = torch.autograd.grad(loss, [last], retain_graph=True)
        model(*data(6)).loss.backward()
        found.append([*alone, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert model.backbone.graphs.replays == 1  # not while `loss` is there
    with pytest.raises(RuntimeError, match='cuda_graph="auto" or False'):
        loss.backward()
    del loss
    model(*data(7)).loss.backward()
    assert model.backbone.graphs.replays == 2


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_steps, "has_others", lambda: True)
    model = make(True)
    for step in range(EAGER_CALLS):
        model(*data(step)).loss.backward()
    loss = model(*data(5)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='cuda_graph="auto" or False'):
        loss.backward()
    loss = model(*data(5)).loss
    with torch.no_grad():
        model.backbone.layers[0].norm.weight.mul_(2)  # type: ignore[index, union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert model.backbone.graphs.replays == 2


def test_other_processes_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(True)
    usual = copy.deepcopy(model)
    for others in (False, True):
        monkeypatch.setattr(graphed_steps, "has_others", lambda others=others: others)
        for step in range(EAGER_CALLS + 1):
            model(*data(step)).loss.backward()
    assert pairs(model) == [1, 4]
    usual.backbone.cuda_graph = False
    for _ in range(2):
        for step in range(EAGER_CALLS + 1):
            usual(*data(step)).loss.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), usual.parameters(), strict=True))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mixer", ON_A_GPU)
def test_on_a_gpu(cuda: torch.device, monkeypatch: pytest.MonkeyPatch, mixer: str, half: bool) -> None:
    train(monkeypatch, 6, device=cuda, half=half, mixer=mixer, layers=5, d_model=64, n_pairs=ON_A_GPU[mixer])


@pytest.mark.gpu
def test_memory_on_a_gpu(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts use one memory: a tenth more than one pair at most."""
    taken = []
    for others in (False, True):
        monkeypatch.setattr(graphed_steps, "has_others", lambda others=others: others)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.manual_seed(0)
        model = causal_lm(VOCABULARY, 512, 12, cuda_graph=True).to(cuda).train()
        for step in range(4):
            model(*data(step, cuda, 8192)).loss.backward()
        assert model.backbone.graphs.replays == 2
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved() - before)
        del model
    assert taken[1] <= 1.1 * taken[0], taken


@pytest.mark.parametrize("several", [False, True])
def test_a_captured_module_is_freed_as_soon_as_nobody_has_it(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory does not wait for Python's collector. Graphs hold nothing of what they were captured from."""

    def record(self: Recorder, run: Callable[[], Any]) -> tuple[Any, Any]:
        return SimpleNamespace(replay=lambda: None), run()

    monkeypatch.setattr(Recorder, "__call__", record)
    monkeypatch.setattr(graphed_steps, "has_others", lambda: several)
    model = make(True)
    for step in range(EAGER_CALLS + 1):
        loss = model(*data(step)).loss
        assert loss is not None
        loss.backward()
    assert pairs(model) == [4 if several else 1]
    backbone = weakref.ref(model.backbone)
    gc.collect()
    gc.disable()
    try:
        del model, loss
        assert backbone() is None
    finally:
        gc.enable()
