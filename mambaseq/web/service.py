"""What the server answers with: a model, its tokenizer and the engine in its thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mambaseq.checkpoints import LoadedModel
from mambaseq.errors import ConfigError
from mambaseq.generation.stopping import StopStrings
from mambaseq.runs.conditions import Known
from mambaseq.serving import Engine, Full, Request, Ticket
from mambaseq.serving.text import Answer
from mambaseq.serving.worker import Worker


class Piece(NamedTuple):
    """New text of the answer to one of several requests, and its ticket, which tells whether it ended."""

    number: int
    text: str
    ended: bool


class Asked:
    """Requests that are answered together: pieces of their text as they come.

    pieces: to be taken by the event loop that asked.
    """

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.tickets: list[Ticket] = []

    def cancel(self) -> None:
        """Free their slots; nothing happens to those that ended."""
        for ticket in self.tickets:
            ticket.cancel()


class Service:
    """Answers texts by a model.

    Raises ConfigError for a model that makes no text, or that needs conditions.
    """

    def __init__(self, name: str, loaded: LoadedModel, engine: Engine) -> None:
        if loaded.tokenizer is None:
            raise ConfigError(f"The model at {loaded.source} has no tokenizer, and the server answers texts.")
        self.name, self.engine, self.tokenizer = name, engine, loaded.tokenizer
        self.stops = StopStrings([], self.tokenizer)
        known = Known(loaded)
        if needed := [one.name or "a condition" for one in known.all if not known.may_lack(one)]:
            raise ConfigError(
                f"The model at {loaded.source} needs {', '.join(needed)[:200]}, and requests have no conditions. Serve "
                "one that was trained without, or with model.encoder.condition_dropout."
            )
        self.start_ids = list(loaded.card.start_ids)
        end = getattr(self.tokenizer, "eos_id", None)
        self.stop_ids = frozenset(() if end is None else (int(end),))
        self.worker = Worker(engine)
        self.begun = int(time.time())
        self.draining = False
        # of all answers together: seconds until the first token and until the last, and how many had a first
        self.to_first, self.to_last, self.first_tokens = 0.0, 0.0, 0

    @property
    def ready(self) -> bool:
        return self.worker.alive and not self.draining

    def ask(self, requests: Sequence[Request], stop: Sequence[str]) -> Asked:
        """Ask for answers, each up to the first of the texts `stop`. By a running event loop.

        Raises what `Engine.ask` raises; none of the requests is then answered.
        """
        loop, asked, stops = asyncio.get_running_loop(), Asked(), StopStrings(list(stop), self.tokenizer)
        try:
            for index, request in enumerate(requests):
                answer = Answer(stops, request.prompt)
                request = dataclasses.replace(request, ends=_ends(answer, request.stop_ids))
                listen = _Listener(self, loop, asked, index, answer)
                asked.tickets.append(self.engine.ask(request, listen))
        except (ConfigError, Full):
            asked.cancel()
            raise
        return asked


def _ends(answer: Answer, stop_ids: frozenset[int]) -> Callable[[int], bool]:
    """Whether an answer's text ends with a token; those that end it anyway are no text."""
    return lambda token: token not in stop_ids and answer.add(token)


class _Listener:
    """Hands the text of an answer on to an event loop, from the engine's thread."""

    def __init__(
        self, service: Service, loop: asyncio.AbstractEventLoop, asked: Asked, index: int, answer: Answer
    ) -> None:
        self._service, self._loop, self._asked, self._index, self._answer = service, loop, asked, index, answer
        self._begun, self._first = time.monotonic(), True

    def __call__(self, ticket: Ticket) -> None:
        ended, service = ticket.finished is not None, self._service
        passed = time.monotonic() - self._begun
        if self._first and ticket.tokens:
            self._first = False
            service.first_tokens += 1
            service.to_first += passed
        if ended:
            service.to_last += passed
        text = self._answer.take(last=ended)
        if text or ended:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                self._loop.call_soon_threadsafe(self._asked.pieces.put_nowait, Piece(self._index, text, ended))
