"""What the server answers with: a model, its tokenizer and the engine in its thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mambaseq.checkpoints import LoadedModel
from mambaseq.errors import ConfigError, UserError
from mambaseq.generation.stopping import StopStrings, Text
from mambaseq.runs.known import Known
from mambaseq.serving import Closed, Engine, Full, Request, Ticket
from mambaseq.serving.text import Answer
from mambaseq.serving.worker import Worker

_AT_ONCE = 16  # tokens that are decoded together
# seconds between two events of streams for each answer that is being made, and at most
_EVENT, _LONGEST_WAIT = 0.001, 0.05


class Piece(NamedTuple):
    """That there is new text of the answer to one of several requests, and whether it ended. text: None where it is
    yet to be made of the answer's tokens."""

    number: int
    text: str | None
    ended: bool


class Asked:
    """Requests that are answered together: pieces of their text as they come.

    pieces: to be taken by the event loop that asked.
    """

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.tickets: list[Ticket] = []
        self.listeners: list[_Listener] = []

    def text(self, piece: Piece) -> str:
        """The text that is new with a piece, each of which is asked for once and in its order."""
        return self.listeners[piece.number].text(self.tickets[piece.number], piece)

    def cancel(self) -> None:
        """Free their slots; nothing happens to those that ended."""
        for ticket in self.tickets:
            ticket.cancel()


def check_serves(loaded: LoadedModel) -> None:
    """Raise ConfigError for a model that makes no text, or that needs conditions. Before an engine is made for it."""
    card, where = loaded.card, loaded.source.parent
    made = None if loaded.tokenizer is None else loaded.tokenizer.decode(np.zeros(0, dtype=np.int64))
    if made is not None and not isinstance(made, str):
        kind = str(card.reader or (card.tokenizer or {}).get("name", "")).partition("/")[0]
        raise ConfigError(
            f"The model at {where} is one of {kind or 'something else'}, and serve takes models of text. Use it by "
            f"`mambaseq generate --checkpoint {where} --out FILE`, or serve a run of text."
        )
    if made is None:
        raise ConfigError(
            f"The model at {where} has no tokenizer, and the server answers texts. Import it again with --tokenizer "
            "FILE (a tokenizer.json), or serve a run of text."
        )
    known = Known(loaded)
    if needed := [one.name or "a condition" for one in known.all if not known.may_lack(one)]:
        raise ConfigError(
            f"The model at {loaded.source} needs {', '.join(needed)[:200]}, and requests have no conditions. Serve "
            "one that was trained without, or with model.encoder.condition_dropout."
        )


class Service:
    """Answers texts by a model.

    Raises ConfigError for a model that makes no text, or that needs conditions.
    """

    def __init__(self, name: str, loaded: LoadedModel, engine: Engine) -> None:
        check_serves(loaded)
        assert loaded.tokenizer is not None
        self.name, self.engine, self.tokenizer = name, engine, loaded.tokenizer
        self.stops = StopStrings([], self.tokenizer)
        self._folder = re.compile(rf"(?<![\w./-]){re.escape(str(loaded.source.parent) + os.sep)}")
        self.start_ids = list(loaded.card.start_ids)
        self.chats, self.damaged = False, ""  # what is wrong with the chat template, which is no reason not to serve
        try:
            self.chats = self.tokenizer.chats
        except UserError as error:
            self.damaged = str(error)
        end = getattr(self.tokenizer, "eos_id", None)
        self.stop_ids = frozenset(() if end is None else (int(end),))
        self.worker = Worker(engine)
        self._outbox: _Outbox | None = None
        self.begun = int(time.time())
        self.draining = False
        # of all answers together: seconds until the first token and until the last, and how many had a first
        self.to_first, self.to_last, self.first_tokens = 0.0, 0.0, 0

    @property
    def problem(self) -> str | None:
        """Why nothing is answered; None where it is."""
        if self.engine.closed is not None:
            return self.engine.closed
        if self.draining:
            return "The server ends. Ask another one."
        return None if self.worker.alive else "The engine has not begun. Ask again later."

    def told(self, error: UserError) -> str:
        """What clients are told of an error: files of the model, such as a chat template, without their folder."""
        return self._folder.sub("", str(error))

    def ask(self, requests: Sequence[Request], stop: Sequence[str], stream: bool = True) -> Asked:
        """Ask for answers, each up to the first of the texts `stop`. By a running event loop.

        stream: whether pieces come as soon as they are there; else each answer is one.

        Raises what `Engine.ask` raises; none of the requests is then answered.
        """
        asked, stops = Asked(), StopStrings(list(stop), self.tokenizer)
        if self._outbox is None or self._outbox.loop is not asyncio.get_running_loop():
            self._outbox = _Outbox(asyncio.get_running_loop(), self.engine)
        try:
            for index, request in enumerate(requests):
                # only who waits for a stop string must look at each token's text while the engine steps
                answer = Answer(stops, request.prompt) if stop else None
                if answer is not None:
                    request = dataclasses.replace(request, ends=_ends(answer, request.stop_ids))
                before = Text(self.tokenizer, request.prompt)
                listen = _Listener(self, self._outbox, asked, index, before, answer, stream)
                asked.listeners.append(listen)
                asked.tickets.append(self.engine.ask(request, listen))
        except (ConfigError, Full, Closed):
            asked.cancel()
            raise
        return asked


def _ends(answer: Answer, stop_ids: frozenset[int]) -> Callable[[int], bool]:
    """Whether an answer's text ends with a token; those that end it anyway are no text."""
    return lambda token: token not in stop_ids and answer.add(token)


class _Outbox:
    """Pieces on their way from the engine's thread to an event loop. First and last ones go at once; where many are
    answered the others wait, and go together: each event takes time from the engine, and waking the loop, too."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: Engine) -> None:
        self.loop, self._engine = loop, engine
        self._lock = threading.Lock()
        self._now: list[tuple[Asked, Piece]] = []
        self._later: dict[tuple[Asked, int], list[Piece]] = {}  # by answer
        self._called = self._timed = False
        self._sent = 0.0

    def put(self, asked: Asked, piece: Piece, at_once: bool) -> None:
        """From the engine's thread."""
        with self._lock:
            if at_once:
                before = self._later.pop((asked, piece.number), ())
                self._now += [(asked, one) for one in (*before, piece)]
                call, called, self._called = self._deliver, self._called, True
            else:
                self._later.setdefault((asked, piece.number), []).append(piece)
                call, called, self._timed = self._wait, self._timed, True
        if not called:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                self.loop.call_soon_threadsafe(call)

    def _wait(self) -> None:
        wait = min(_EVENT * self._engine.active, _LONGEST_WAIT) + self._sent - time.monotonic()
        self.loop.call_later(max(wait, 0.0), self._deliver_all)

    def _deliver(self) -> None:
        with self._lock:
            self._called, pieces, self._now = False, self._now, []
        for asked, piece in pieces:
            asked.pieces.put_nowait(piece)

    def _deliver_all(self) -> None:
        self._deliver()
        with self._lock:
            self._timed, later, self._later = False, self._later, {}
        for (asked, _), pieces in later.items():
            for piece in pieces:
                asked.pieces.put_nowait(piece)
        self._sent = time.monotonic()


class _Listener:
    """Hands the text of an answer on to an event loop, from the engine's thread. Without stop strings the text is made
    in the event loop, of all tokens that are there.

    made: the text so far, for answers without stop strings. answer: of one with them.
    """

    def __init__(
        self,
        service: Service,
        outbox: _Outbox,
        asked: Asked,
        index: int,
        made: Text,
        answer: Answer | None,
        stream: bool,
    ) -> None:
        self._service, self._outbox, self._asked, self._index = service, outbox, asked, index
        self._made, self._answer, self._stream = made, answer, stream
        self._begun, self._first = time.monotonic(), True
        self._called, self._given = False, 0  # whether a piece is on its way; tokens whose text was made

    def __call__(self, ticket: Ticket) -> None:
        ended, service = ticket.finished is not None, self._service
        first = self._first and bool(ticket.tokens)
        if first:
            self._first = False
            service.first_tokens += 1
            service.to_first += time.monotonic() - self._begun
        if ended:
            service.to_last += time.monotonic() - self._begun
        elif not self._stream:
            return
        text: str | None = None
        if self._answer is not None:
            text = self._answer.take(last=ended)
            if not text and not ended:
                return
        elif self._called and not ended:
            return
        self._called = True
        self._outbox.put(self._asked, Piece(self._index, text, ended), first or ended)

    def text(self, ticket: Ticket, piece: Piece) -> str:
        """The text of a piece; by the event loop."""
        if piece.text is not None:
            return piece.text
        self._called = False  # before the look: what comes later calls again
        ids = ticket.tokens[self._given :]
        self._given += len(ids)
        ids = [token for token in ids if token not in ticket.request.stop_ids]
        made = [self._made.add(ids[begin : begin + _AT_ONCE]) for begin in range(0, len(ids), _AT_ONCE)]
        return "".join([*made, self._made.rest() if piece.ended else ""])
