"""Where a part of the engine fails, or its thread ends: who is told, and who goes on."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from engines import expected, made, prompt_of, run

from mambaseq.serving import Engine, Full, Request, Ticket
from mambaseq.serving.worker import Worker


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("the device has failed")


@pytest.mark.parametrize(
    "where", ["slots.enter", "_picker.enter", "_picker._sent", "_picker.pick", "_to_host", "_leave", "Tensor.clone"]
)
def test_an_answer_that_fails_on_its_way_into_the_batch_leaves_the_others_as_they_are(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(made(), slots=4)
    one = engine.ask(Request(prompt_of(5), 30, temperature=0))
    engine.step()
    part, _, name = f"engine.{where}".rpartition(".")
    with monkeypatch.context() as patch:
        owner = {"engine": engine, "engine.slots": engine.slots, "engine._picker": engine._picker}.get(
            part, torch.Tensor
        )
        patch.setattr(owner, name, broken)
        failed = [engine.ask(Request(prompt_of(7, n), 1, presence_penalty=0.5)) for n in range(2)]
        engine._read()
    assert [ticket.finished for ticket in failed] == ["failed", "failed"]
    assert "device has failed" in str(failed[0].error)
    assert (one.finished, engine.slots.used, engine.active) == (None, 1, 1)
    others = [engine.ask(Request(prompt_of(6, 2), 20, seed=n, presence_penalty=n / 2)) for n in range(3)]
    run(engine)
    for ticket in [one, *others]:
        assert ticket.tokens == expected(engine.model, ticket.request)
    assert engine.slots.used == 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("part", [64, 3])
def test_nobody_waits_for_a_device_that_has_failed_for_good(
    late: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(made(), slots=3, part=part, late=late)
    told: list[Ticket] = []

    def listen(ticket: Ticket) -> None:
        if ticket.finished is not None:
            told.append(ticket)

    # they end by their number at different steps, one waits, and with small parts some are still read
    tickets = [engine.ask(Request(prompt_of(5, n), length), listen) for n, length in enumerate((4, 5, 1000, 1000))]
    for _ in range(3 if late else 2):
        engine.step()
    assert not any(ticket.finished for ticket in tickets)
    for owner, name in ((engine.slots, "step"), (engine.slots, "leave"), (engine.slots, "enter")):
        monkeypatch.setattr(owner, name, broken)
    monkeypatch.setattr(engine, "_look", broken)
    monkeypatch.setattr(engine.model.backbone, "forward", broken)
    worker = Worker(engine)
    worker.start()
    try:
        for _ in range(2):  # the second is asked of a device that failed before
            for _ in range(1000):
                if all(ticket.finished for ticket in tickets):
                    break
                time.sleep(0.01)
            assert all(ticket.finished for ticket in tickets)
            tickets.append(engine.ask(Request(prompt_of(5), 5), listen))
        assert worker.alive
    finally:
        worker.close()
    assert tickets[-1].finished is not None
    assert (len(told), len(set(told))) == (len(tickets), len(tickets))
    assert (engine.busy, engine.slots.used, engine.waiting) == (False, 0, 0)


def test_all_are_told_where_the_thread_ends_by_what_is_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def ended() -> bool:
        raise Ended

    engine = Engine(made())
    ticket = engine.ask(Request(prompt_of(3), 5))
    monkeypatch.setattr(engine, "step", ended)
    with pytest.raises(Ended):
        Worker(engine)._work()
    assert ticket.finished == "cancelled"


def test_a_request_that_begins_while_another_is_asked_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(made(), slots=2, queue=0)
    asked: list[Ticket] = []
    begin = engine._readings.begin

    def begun(ticket: Ticket) -> bool:
        found = begin(ticket)
        if not asked:
            asked.append(engine.ask(Request(prompt_of(4), 2)))
        return found

    monkeypatch.setattr(engine._readings, "begin", begun)
    one = engine.ask(Request(prompt_of(3), 2))
    run(engine)
    assert (one.finished, asked[0].finished) == ("length", "length")
    for _ in range(2):
        engine.ask(Request(prompt_of(3), 2))
    with pytest.raises(Full):
        engine.ask(Request(prompt_of(3), 2))
