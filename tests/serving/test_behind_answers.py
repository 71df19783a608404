"""What is not told by answers: states that are kept are behind the tokens that lead to them, what is left of one row of
prompts is not in the next, and picks are captured where a graph tells what they are of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import expected, made, prompt_of, run

from mambaseq.ops.gpu.capture import Replay
from mambaseq.serving import Engine, PrefixCache, Request
from mambaseq.serving.parts import Parts
from mambaseq.serving.slots import Slots


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_follows_an_answer_that_a_token_has_ended_is_that_of_generate(late: bool, place: int) -> None:
    """Who looks late gives the device tokens behind the last: behind the first, two."""
    model, prompt = made(), prompt_of(9, 5)
    stop = expected(model, Request(prompt, place + 1, temperature=0))[place]
    engine = Engine(model, slots=3, cache=PrefixCache(64, 2**24), late=late)
    ended = engine.ask(Request(prompt, 8, temperature=0, stop_ids=frozenset({stop})))
    run(engine)
    assert ended.finished == "stop"
    assert len(ended.tokens) == place + 1
    following = Request(np.concatenate([prompt, ended.tokens, prompt_of(3, 7)]), 10, temperature=0)
    ticket = engine.ask(following)
    run(engine)
    assert ticket.known >= len(prompt)
    assert ticket.tokens == expected(model, following)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["mamba", "mamba3", "retention"])
def test_a_row_is_read_alike_whatever_the_one_before_has_left(mixer: str) -> None:
    model = made(mixer)
    parts = Parts(model, Slots(model, 4).layout, 64, [32, 64], 4)
    prompts = [prompt_of(5 + n, n) for n in range(3)]
    clean, hidden = parts.read(prompts[:1], [None])
    broken = [torch.full_like(tensor, torch.nan) for tensor in clean[0]]
    parts.read(prompts, [broken] * 3)  # of requests whose sums were too large, say
    again, told = parts.read(prompts[:1], [None])
    assert torch.equal(told, hidden)
    for found, wanted in zip(again[0], clean[0], strict=True):
        assert torch.equal(found, wanted)


def test_picks_of_what_no_graph_tells_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is somewhere else at each step, so no graph of a pick would be replayed."""
    model, seen = made(), list[Replay]()

    class Watched(Replay):
        def __call__(self) -> tuple[torch.Tensor, ...]:
            seen.append(self)
            return super().__call__()

    monkeypatch.setattr("mambaseq.serving.picking.Replay", Watched)
    engine = Engine(model, slots=2, fixed=True)
    tickets = [engine.ask(Request(prompt_of(5, seed), 9, seed=seed)) for seed in range(2)]
    run(engine)
    assert [ticket.tokens for ticket in tickets] == [expected(model, ticket.request) for ticket in tickets]
    assert not seen
    engine._picker.warm_up(torch.zeros(2, 31))  # as where a graph tells
    assert len({*seen}) == len(seen) / 2 == 4
