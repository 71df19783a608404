"""The engine: answers are `generate`'s, prefixes are found again, slots are freed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from engines import expected, made, prompt_of, run

from mambaseq.errors import ConfigError
from mambaseq.generation import generate
from mambaseq.generation.sampling import sample
from mambaseq.serving import Engine, Full, PrefixCache, Request, Ticket
from mambaseq.serving.picking import Needs, kinds, sample_rows

NAN = float("nan")


UNET = {"name": "unet", "n_layers": 1, "pool": [2, 2]}


@pytest.mark.parametrize(
    ("mixer", "backbone", "late", "part", "fixed"),
    [
        ("mamba", None, False, 7, False),
        ("s4d", UNET, False, 7, False),
        ("mamba", None, True, 64, False),
        ("mamba", None, True, 50, True),
        ("mamba2", None, True, 7, True),
        ("gated_delta", None, False, 64, True),
        ("s4d", UNET, True, 64, True),
        ("mlp", None, True, 64, True),
    ],
)
def test_answers_are_those_of_generate_whatever_else_is_in_the_batch(
    mixer: str, backbone: dict[str, object] | None, late: bool, part: int, fixed: bool
) -> None:
    model = made(mixer, backbone)
    engine = Engine(model, slots=3, part=part, cache=PrefixCache(4, 2**20), late=late, fixed=fixed)
    engine.warm_up()
    shared = prompt_of(9, 99)
    requests = [
        Request(np.concatenate([shared, prompt_of(n, n)])[: 3 + 2 * n], 5 + 3 * n, **more)
        for n, more in enumerate(
            [
                {"temperature": 0},
                {"seed": 5},
                {"seed": 5, "temperature": 0.7, "top_k": 9, "stop_ids": frozenset({3, 8, 11})},
                {"seed": 6, "top_p": 0.8, "min_p": 0.01},
                {"seed": 6, "number": 2, "repetition_penalty": 1.3, "presence_penalty": 0.5},
                {"seed": 7, "presence_penalty": -1.5},
                {"temperature": 0, "stop_ids": frozenset({int(prompt_of(1)[0])})},
            ]
        )
    ]
    tickets: list[Ticket] = []
    for request in [*requests, *requests[:3]]:  # some come later, while others are in the batch; some twice
        tickets.append(engine.ask(request))
        engine.step()
    run(engine)
    for ticket in tickets:
        assert ticket.tokens == expected(model, ticket.request)
        ended = ticket.tokens[-1] in ticket.request.stop_ids
        assert ticket.finished == ("stop" if ended else "length")
    assert engine.counts.answered == len(tickets)
    assert engine.counts.new_tokens == sum(len(ticket.tokens) for ticket in tickets)
    assert engine.slots.used == engine.active == 0


class Replayed:
    """A CUDA graph on a CPU: what ran once is run again into the same memory, which all graphs share."""

    why_not = None
    made: ClassVar[list[tuple[torch.Tensor, ...]]] = []  # by all

    def __init__(self, run: Callable[[], tuple[torch.Tensor, ...]], *_: object) -> None:
        self._run, self.calls = run, 0
        self._own: tuple[torch.Tensor, ...] = ()

    def __call__(self) -> tuple[torch.Tensor, ...]:
        for others in self.made:
            for tensor in others:
                tensor.fill_(0 if tensor.dtype == torch.int64 else NAN)
        found, self.calls = self._run(), self.calls + 1
        if self.calls < 2:
            return found
        if not self._own:
            self._own = found
            self.made.append(found)
        for own, new in zip(self._own, found, strict=True):
            own.copy_(new)
        return self._own


@pytest.mark.parametrize("late", [False, True])
def test_answers_from_graphs_are_those_of_generate(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what a graph computes is looked up when it is replayed, and nothing is left where the next one
    writes."""
    model = made()
    for module in ("parts", "picking"):
        monkeypatch.setattr(f"mambaseq.serving.{module}.Replay", Replayed)
    monkeypatch.setattr("mambaseq.serving.parts.can_capture", lambda *_: True)
    monkeypatch.setattr(Replayed, "made", [])
    engine = Engine(model, slots=6, part=40, cache=PrefixCache(16, 2**24), late=late, fixed=True)
    told: dict[int, torch.Tensor] = {}

    def decoder(count: int, make: Any = engine.slots._decoder) -> Any:
        """Whose steps tell in the same memory each time, as those of a graph."""
        found = make(count)
        if count not in told:
            told[count] = found.model.step_(torch.zeros(count, dtype=torch.int64), found.state)
            step = found.step
            found.step = lambda token: told[count].copy_(step(token))
        return found

    monkeypatch.setattr(engine.slots, "_decoder", decoder)
    monkeypatch.setattr(engine, "_to_host", lambda found: (found.clone(), None))
    assert engine.warm_up().made == engine.warm_up().of == 4 + 2  # of 1, 2, 4 and 6 answers, and 32 and 40 tokens
    made_so_far = len(Replayed.made)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 3, "top_k": 5},
        {"seed": 4, "temperature": 0.7, "stop_ids": frozenset({1, 2, 3})},
        {"seed": 3, "top_p": 0.7, "min_p": 0.02},
    ]
    tickets = []
    for number in range(14):
        tickets.append(engine.ask(Request(prompt_of(5 + 6 * number, number % 7), 9 + number, **kinds[number % 4])))
        if number % 2:
            engine.step()
    run(engine)
    penalised = engine.ask(Request(prompt_of(30, 1), 9, seed=5, repetition_penalty=1.3))
    run(engine)
    assert [ticket.error for ticket in tickets if ticket.error] == []
    for ticket in [*tickets, penalised]:
        assert ticket.tokens == expected(model, ticket.request)
    assert len(Replayed.made) == made_so_far == 2 + 4 * 4  # all that requests needed was captured before


@pytest.mark.gpu
def test_answers_on_a_gpu_are_those_of_generate(cuda: torch.device) -> None:
    model = made().to(cuda)
    engine = Engine(model, slots=4, part=32, cache=PrefixCache(16, 2**24))
    assert engine.late
    engine.warm_up()
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 3, "top_k": 5},
        {"seed": 3, "top_p": 0.7, "repetition_penalty": 1.2},
        {"seed": 4, "stop_ids": frozenset({1, 2, 3})},
    ]
    tickets = [engine.ask(Request(prompt_of(5 + 9 * n, n), 12 + n, **kinds[n % 4])) for n in range(10)]
    run(engine)
    for ticket in tickets:
        request = ticket.request
        settings = {**request.settings._asdict(), "seed": request.seed, "stop_ids": request.stop_ids}
        prompt = torch.from_numpy(request.prompt)[None].to(cuda)
        out = generate(model, prompt, request.max_new_tokens, **settings)
        assert ticket.tokens == out[0, prompt.shape[1] :].tolist()


def run_of(engine: Engine, prompt: np.ndarray) -> int:
    """Tokens of a prompt that are run for it."""
    before = engine.counts.run
    ticket = engine.ask(Request(prompt, 1, temperature=0))
    run(engine)
    assert ticket.tokens == expected(engine.model, ticket.request)
    assert ticket.known + engine.counts.run - before == len(prompt)
    return engine.counts.run - before


def test_a_shared_prefix_of_any_length_runs_fewer_than_k_of_its_tokens_again() -> None:
    every = 8
    engine = Engine(made(), part=64, cache=PrefixCache(every, 2**24))
    first = prompt_of(45)
    assert run_of(engine, first) == 45
    assert run_of(engine, first) == 0  # the end of a prompt is known, its output too
    assert run_of(engine, np.concatenate([first, prompt_of(3, 1)])) == 3
    for shared in range(1, 45):  # what follows differs from all before it
        follows = (first[shared] + 1 + np.arange(2)) % 31
        assert run_of(engine, np.concatenate([first[:shared], follows])) - 2 <= every - 1


@pytest.mark.parametrize("late", [False, True])
def test_an_answer_is_a_prefix_too(late: bool) -> None:
    engine = Engine(made(), cache=PrefixCache(8, 2**24), late=late)
    ticket = engine.ask(Request(prompt_of(5), 20, temperature=0))
    run(engine)
    spoken = np.concatenate([ticket.request.prompt, ticket.tokens, prompt_of(2, 1)])
    assert run_of(engine, spoken) == 3  # its last token was never read
    spoken[14] = (spoken[14] + 1) % 31
    assert run_of(engine, spoken) == len(spoken) - 8
    stop = frozenset({ticket.tokens[12]})
    ended = engine.ask(Request(prompt_of(5, 2), 400, seed=3, stop_ids=stop))  # nobody knows before where it ends
    run(engine)
    assert ended.finished == "stop"
    spoken = np.concatenate([ended.request.prompt, ended.tokens, prompt_of(2, 1)])
    assert run_of(engine, spoken) == (2 if late else 3)


def test_requests_that_share_a_prompt_cost_one_reading() -> None:
    engine = Engine(made(), slots=8, part=64, cache=PrefixCache(16, 2**24))
    prompt = prompt_of(200)
    tickets = [engine.ask(Request(prompt, 4, number=number)) for number in range(8)]
    run(engine)
    assert engine.counts.run == 200
    assert engine.counts.prompt_tokens == 8 * 200
    assert len({tuple(ticket.tokens) for ticket in tickets}) > 1


def test_prompts_that_begin_alike_wait_for_the_first_and_others_do_not() -> None:
    engine = Engine(made(), slots=8, part=32, cache=PrefixCache(16, 2**24))
    shared = prompt_of(200)
    alike = [engine.ask(Request(np.append(shared, [n, 7, n]), 4, temperature=0)) for n in range(6)]
    other = engine.ask(Request(prompt_of(10, 5), 4, temperature=0))
    engine.step()
    assert len(other.tokens) == 2  # the rest of the part was its own
    run(engine)
    assert engine.counts.run == 203 + 5 * (203 - 192) + 10  # 192 is the last multiple of 16 that they share
    assert [ticket.known for ticket in alike] == [0] + 5 * [192]
    for ticket in [*alike, other]:
        assert ticket.tokens == expected(engine.model, ticket.request)


def test_prompts_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = Engine(made(), part=64), []
    forward = engine.model.backbone.forward

    def counted(x: torch.Tensor, **options: Any) -> Any:
        calls.append(x.shape[1])
        return forward(x, **options)

    monkeypatch.setattr(engine.model.backbone, "forward", counted)
    tickets = [engine.ask(Request(prompt_of(length, length), 3, seed=1)) for length in (9, 4, 40, 30, 1)]
    run(engine)
    assert calls == [64, 20]  # what did not fit went on from its state, beside the last
    assert engine.counts.run == 84
    monkeypatch.undo()
    for ticket in tickets:
        assert ticket.tokens == expected(engine.model, ticket.request)


def test_rows_are_picked_by_their_own_settings() -> None:
    rng = random.Random(0)
    logits = 3 * torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    choices = {
        "temperature": [0.0, 0.3, 1.0, 7.0, 1e-9],
        "top_k": [0, 1, 5, 40, 99],
        "top_p": [1.0, 0.8, 0.1],
        "min_p": [0.0, 0.05, 1.0],
    }
    rows = [{name: rng.choice(some) for name, some in choices.items()} for _ in range(200)]
    values = np.array([[row[name] for row in rows] for name in choices], dtype=float)
    there = {name: torch.from_numpy(some)[:, None] for name, some in zip(choices, values, strict=True)}
    uniform = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = [
        sample(logits[n, None], uniform=uniform[n, None], **row).item() if row["temperature"] > 0 else None  # type: ignore[arg-type]
        for n, row in enumerate(rows)
    ]

    def check(some: list[int]) -> Needs:
        """That rows have their tokens whatever is left out because none of them needs it. Returns what they need."""
        needs = Needs.of(values[:, some], 40)
        under = {name: value[some] for name, value in there.items()}
        for each in {needs, needs.rounded(40)}:
            tokens = sample_rows(logits[some], under, uniform[some], each).tolist()
            assert all(wanted[n] in (None, token) for n, token in zip(some, tokens, strict=True))
        return needs.rounded(40)

    check([*range(200)])
    found = {check([n]) for n in range(200) if rows[n]["temperature"] > 0}
    assert {replaced._replace(greedy=True) for replaced in found} == {*kinds(40)[1:]}


def test_the_cache_keeps_to_its_bytes_and_forgets_the_least_recently_used() -> None:
    engine = Engine(made(), slots=2)
    state, size = engine.slots.layout.empty, engine.slots.bytes_each
    cache = PrefixCache(4, 3 * size)
    one, two, three, four = (prompt_of(6, seed) for seed in range(4))
    for prompt in (one, two, three):
        cache.keep(prompt, state, None)
    assert (len(cache), cache.bytes) == (3, 3 * size)
    assert cache.longest(np.append(one, 1)) is not None  # used again
    cache.keep(four, state, None)
    assert (len(cache), cache.bytes) == (3, 3 * size)
    assert [cache.longest(np.append(prompt, 1)) is not None for prompt in (one, two, three, four)] == [1, 0, 1, 1]
    assert cache.longest(one) is None  # the output at its last token is not known
    small = PrefixCache(4, size - 1)
    small.keep(one, state, None)
    assert (len(small), small.bytes) == (0, 0)


def test_a_state_of_the_cache_holds_no_more_memory_than_it_says() -> None:
    cache = PrefixCache(64, 2**24)
    engine = Engine(made(), part=512, cache=cache)
    engine.ask(Request(prompt_of(300), 1))
    run(engine)
    entry = cache.longest(np.append(prompt_of(300), 0))
    assert entry is not None
    assert entry.length == 300
    assert entry.hidden is not None
    tensors = [*entry.state, entry.hidden]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == entry.bytes
    assert len(cache) == 5  # at 64, 128, 192 and 256 tokens, and at the end


@pytest.mark.parametrize("late", [False, True])
def test_cancelling_frees_the_slot_within_a_step_and_floods_are_refused(late: bool) -> None:
    engine = Engine(made(), slots=2, queue=1, part=4, late=late)
    ended: list[str | None] = []

    def listen(ticket: Ticket) -> None:
        if ticket.finished:
            ended.append(ticket.finished)

    def ask(length: int = 2) -> Ticket:
        return engine.ask(Request(prompt_of(length), 1000), listen)

    one, two = ask(), ask()
    engine.step()
    engine.step()
    assert engine.slots.used == 2
    three = ask(40)
    with pytest.raises(Full, match="wait already"):
        ask()
    one.cancel()
    engine.step()
    assert (one.finished, engine.slots.used, engine.active, engine.waiting) == ("cancelled", 1, 2, 0)
    four = ask()
    three.cancel()  # while it is read
    four.cancel()  # while it waits
    engine.step()
    assert (three.finished, four.finished, three.tokens) == ("cancelled", "cancelled", [])
    assert (engine.slots.used, engine.active, engine.waiting) == (1, 1, 0)
    before = two.tokens[:]
    engine.step()
    assert two.tokens[:-1] == before
    engine.end_all()
    assert (two.finished, engine.busy, len(ended)) == ("cancelled", False, 4)
    assert (engine.counts.cancelled, engine.counts.refused) == (4, 1)


@pytest.mark.parametrize("late", [False, True])
def test_who_is_told_of_an_end_may_ask_again_at_once(late: bool) -> None:
    engine, tickets = Engine(made(), slots=1, queue=0, late=late), []

    def listen(ticket: Ticket) -> None:
        if ticket.finished and len(tickets) < 4:
            tickets.append(engine.ask(ticket.request, listen))

    tickets.append(engine.ask(Request(prompt_of(3), 2), listen))
    run(engine)
    assert [ticket.finished for ticket in tickets] == ["length"] * 4


def test_a_long_prompt_is_read_between_the_tokens_of_others() -> None:
    engine = Engine(made(), part=10)
    short, long = engine.ask(Request(prompt_of(2), 30)), None
    engine.step()
    long = engine.ask(Request(prompt_of(95), 2))
    for step in range(1, 10):
        before = len(short.tokens)
        engine.step()
        assert (len(short.tokens) - before, long.tokens, engine.counts.run) == (1, [], 2 + 10 * step)


@pytest.mark.parametrize("late", [False, True])
def test_what_ends_an_answer_may_look_at_its_tokens(late: bool) -> None:
    seen: list[int] = []

    def ends(token: int) -> bool:
        seen.append(token)
        return len(seen) == 4

    def fails(token: int) -> bool:
        raise ValueError(f"what is {token}?")

    engine = Engine(made(), late=late)
    ticket, failed = (engine.ask(Request(prompt_of(3), 100, ends=what)) for what in (ends, fails))
    run(engine)
    assert (failed.finished, str(failed.error)[:7]) == ("failed", "what is")
    assert (ticket.tokens, ticket.finished) == (seen, "stop")
    assert len(seen) == 4


@pytest.mark.parametrize("late", [False, True])
def test_predictions_that_are_no_numbers_end_their_own_request_only(late: bool) -> None:
    model = made()
    with torch.no_grad():
        model.encoder.embedding.weight[7] = NAN  # type: ignore[union-attr, index]
    engine = Engine(model, late=late)
    fine, broken = (engine.ask(Request(np.array(ids), 5, temperature=0)) for ids in ([1, 2], [1, 7]))
    run(engine)
    assert (fine.finished, broken.finished) == ("length", "failed")
    assert "not a finite number" in str(broken.error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.zeros(0, dtype=np.int64)}, "at least one token"),
        ({"prompt": np.zeros(2)}, "whole numbers"),
        ({"prompt": np.array([31])}, "lacks"),
        ({"prompt": np.array([-1])}, "lacks"),
        ({"prompt": prompt_of(98)}, "more than the 100"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": NAN}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_requests_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    engine = Engine(made(), longest=100)
    with pytest.raises(ConfigError, match=message):
        engine.ask(Request(**{"prompt": prompt_of(3), "max_new_tokens": 3, **change}))  # type: ignore[arg-type]
    assert not engine.busy


def test_models_whose_states_grow_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="Attention"):
        Engine(made("attention"))


@pytest.mark.parametrize("every", [1, 3, 5])
def test_the_longest_of_several_states_is_found(every: int) -> None:
    state = Engine(made()).slots.layout.empty
    tokens, cache = prompt_of(20), PrefixCache(every, 2**24)
    for length in (1, 4, 7, 8, 15):
        cache.keep(tokens[:length], state, None)
    for length in range(1, 20):
        found = cache.longest(tokens[:length])
        wanted = max((n for n in (1, 4, 7, 8, 15) if n < length), default=None)
        assert (None if found is None else found.length) == wanted
