"""Beam search against all sequences that there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from generation.test_ragged import lively

from mambaseq.errors import ConfigError
from mambaseq.generation import generate
from mambaseq.generation.beams import beam_search
from mambaseq.generation.prompts import Prompts
from mambaseq.models import SequenceModel, causal_lm


def every(model: SequenceModel, prompt: torch.Tensor, count: int, stop: int | None, penalty: float) -> dict:
    """The score of each sequence that ends with a stop or has `count` tokens."""
    tails = list(itertools.product(range(4), repeat=count))
    rows = torch.stack([torch.cat([prompt, torch.tensor(tail)]) for tail in tails])
    with torch.no_grad():
        shares = model(rows).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    told = shares.gather(2, rows[:, len(prompt) :, None])[..., 0].cumsum(1).tolist()
    found = {}
    for tail, sums in zip(tails, told, strict=True):
        length = tail.index(stop) + 1 if stop in tail else count
        found[tail[:length]] = sums[length - 1] / length**penalty
    return found


@pytest.mark.parametrize(("stop", "penalty"), [(None, 1.0), (2, 1.0), (2, 0.0)])
def test_enough_beams_find_the_likeliest_of_all(stop: int | None, penalty: float) -> None:
    model = causal_lm(vocab_size=4, d_model=8, n_layers=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    prompts = [torch.tensor([1, 3, 0]), torch.tensor([2])]
    stops = () if stop is None else (stop,)
    tokens, scores = beam_search(model, Prompts.of(prompts), 3, 16, stop_ids=stops, length_penalty=penalty)
    for row, told, prompt in zip(tokens.tolist(), scores.tolist(), prompts, strict=True):
        known = sorted(every(model, prompt, 3, stop, penalty).items(), key=lambda one: -one[1])[:16]
        for ids, score, (tail, expected) in zip(row, told, known, strict=True):
            assert tuple(ids)[: len(tail)] == tail
            assert set(ids[len(tail) :]) <= {stop}
            assert score == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["mamba", "attention"])
def test_one_beam_is_greedy_and_more_are_likelier(kind: str) -> None:
    model = lively(mixer=kind)
    prompt = torch.randint(0, 29, (2, 7))
    one = beam_search(model, Prompts.of(prompt), 9, 1)
    assert torch.equal(one.tokens[:, 0], generate(model, prompt, 9, temperature=0)[:, 7:])
    more = beam_search(model, Prompts.of(prompt), 9, 6)
    assert bool((more.scores[:, 0] >= one.scores[:, 0]).all())
    with torch.no_grad():  # what is told of it is what the model tells of the whole
        shares = model(torch.cat([prompt, more.tokens[:, 0]], 1)[:, :-1]).logits[:, 6:].double().log_softmax(-1)
    told = shares.gather(2, more.tokens[:, 0][..., None])[..., 0].mean(1)
    torch.testing.assert_close(told, more.scores[:, 0], rtol=1e-4, atol=1e-5)


def test_searches_that_are_none() -> None:
    model, prompts = lively(), Prompts.of(torch.ones(1, 1).long())
    for beams, more in ((0, {}), (1025, {}), (True, {}), (2, {"length_penalty": float("nan")})):
        with pytest.raises(ConfigError, match=r"beams must be|length_penalty must be"):
            beam_search(model, prompts, 3, beams, **more)
