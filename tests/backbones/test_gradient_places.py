"""Gradients of captured steps lie where they are wanted, and nowhere that something else lies."""

from __future__ import annotations

import copy

import pytest
import torch
from backbones.graph_stand_ins import stand_in_graphs  # noqa: F401
from torch import Tensor

from mambaseq.backbones import graphed_steps
from mambaseq.backbones.graphed import EAGER_CALLS
from mambaseq.models import SequenceModel, causal_lm

VOCABULARY = 7


def captured(monkeypatch: pytest.MonkeyPatch, **options: int) -> tuple[SequenceModel, SequenceModel]:
    """A model whose next steps are replayed in parts, and one that is run as usual."""
    monkeypatch.setattr(graphed_steps, "has_others", lambda: True)
    torch.manual_seed(0)
    model = causal_lm(VOCABULARY, 8, 5, cuda_graph=True, **options).train()
    usual = copy.deepcopy(model)
    usual.backbone.cuda_graph = False
    for step in range(EAGER_CALLS + 1):
        run(model, step)
    model.zero_grad()
    assert model.backbone.graphs.replays == 1
    return model, usual


def loss_of(model: SequenceModel, step: int, length: int = 12) -> Tensor:
    tokens = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(step))
    return model(tokens[:, :-1], tokens[:, 1:].contiguous()).loss


def run(model: SequenceModel, step: int, length: int = 12) -> None:
    loss_of(model, step, length).backward()


def places_of(model: SequenceModel) -> dict[Tensor, Tensor]:
    """Parts of one memory, as buckets are."""
    learned = list(model.backbone.parameters())
    memory = torch.full((sum(p.numel() for p in learned),), torch.nan)
    found = memory.split([p.numel() for p in learned])
    return {p: place.view_as(p) for p, place in zip(learned, found, strict=True)}


def same(model: SequenceModel, usual: SequenceModel) -> bool:
    pairs = zip(model.parameters(), usual.parameters(), strict=True)
    return all(torch.equal(p.grad, q.grad) for p, q in pairs)  # type: ignore[arg-type]


def test_gradients_are_written_into_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model, usual = captured(monkeypatch)
    places = places_of(model)
    for step in (10, 11):
        model.backbone.graphs.places.update(places)
        model.zero_grad()
        usual.zero_grad()
        run(model, step)
        run(usual, step)
        assert same(model, usual)
        assert all(p.grad.data_ptr() == place.data_ptr() for p, place in places.items())  # type: ignore[union-attr]
    assert model.backbone.graphs.replays == 3


def test_a_place_is_for_one_of_the_gradients_that_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of two lengths in one backward pass have graphs of their own, of which both give all gradients."""
    model, usual = captured(monkeypatch)
    for step in range(EAGER_CALLS + 1):
        run(model, step, 9)
    assert model.backbone.graphs.captured == 2
    before = model.backbone.graphs.replays
    for one in (model, usual):
        one.zero_grad()
    model.backbone.graphs.places.update(places_of(model))
    for one in (model, usual):
        (loss_of(one, 10) + loss_of(one, 11, 9)).backward()
    assert model.backbone.graphs.replays == before + 2
    assert same(model, usual)


def test_what_was_accumulated_in_a_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, usual = captured(monkeypatch)
    places = places_of(model)
    usual.zero_grad()
    for step in (10, 11, 12):  # no gradient is cleared between them
        model.backbone.graphs.places.update(places)
        run(model, step)
        run(usual, step)
    assert same(model, usual)


def test_places_of_another_kind_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, usual = captured(monkeypatch)
    places = {p: torch.empty_like(p, dtype=torch.float64).detach() for p in model.backbone.parameters()}
    turned = next(p for p in places if p.dim() == 2 and p.shape[0] != p.shape[1])
    places[turned] = torch.empty(turned.shape[::-1]).T
    model.backbone.graphs.places.update(places)
    usual.zero_grad()
    run(model, 10)
    run(usual, 10)
    assert same(model, usual)
    assert all(p.grad is not places[p] and p.grad.stride() == p.stride() for p in places)  # type: ignore[union-attr]


def test_a_copy_has_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = captured(monkeypatch)
    model.backbone.graphs.places.update(places_of(model))
    assert not copy.deepcopy(model).backbone.graphs.places
