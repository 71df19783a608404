"""Continuous batching: requests join and leave a batch of states between any two steps, and prompts are read in parts
beside it."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mambaseq import limits
from mambaseq.encoders import TokenEncoder
from mambaseq.errors import ConfigError, UserError
from mambaseq.generation.decode import PENALTIES, check_one_pick, check_whole, continues, not_finite
from mambaseq.generation.sampling import sample
from mambaseq.mixers.base import State
from mambaseq.models import SequenceModel
from mambaseq.serving.prefixes import PrefixCache
from mambaseq.serving.requests import Request, Settings, Ticket
from mambaseq.serving.slots import Slots


class Full(UserError):
    """As many requests wait as may."""


@dataclasses.dataclass
class Counts:
    """What an engine has done since it was made. prompt_tokens: of the prompts that were begun; run: those of them that
    were not known from earlier ones. answered: requests that ended by themselves."""

    prompt_tokens: int = 0
    run: int = 0
    new_tokens: int = 0
    steps: int = 0
    answered: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0


@dataclasses.dataclass
class _Reading:
    """A prompt that is being read: its state behind the first `at` tokens, and the backbone's last output."""

    ticket: Ticket
    at: int = 0
    state: list[State] | None = None
    hidden: Tensor | None = None


class Engine:
    """Answers requests together; made for one thread that steps, and any that ask and cancel.

    A step ends what was cancelled, reads at most `part` tokens of prompts, and adds one token to each answer in the
    batch. An answer is the one that `generate` gives for its prompt, settings, seed and number, whatever else is in the
    batch: as exactly as a model's outputs are those of a batch of another size, which on most devices is up to the
    last bits.

    Args:
        model: a causal one of tokens whose states have a fixed size; in eval mode from now on.
        slots: answers that are made at once. queue: requests that may wait. part: tokens of prompts in a step.
        longest: most tokens of a prompt and its answer together.
        cache: states of prompts to be found again; None keeps none.

    Raises ConfigError for a model that cannot be served, and for numbers out of range.
    """

    def __init__(
        self,
        model: SequenceModel,
        *,
        slots: int = 16,
        queue: int = 64,
        part: int = 512,
        longest: int = 65_536,
        cache: PrefixCache | None = None,
    ) -> None:
        if not continues(model, "tokens") or getattr(model.head, "codes", 0) > 0:
            raise ConfigError(
                "Only a causal model with an lm head of one token a position can be served; this one cannot. Train one "
                "with the head lm and a causal backbone, such as residual."
            )
        model.check_stateful()
        check_whole("slots", slots, 1, limits.BATCH.value)
        check_whole("queue", queue, 0, limits.SEQUENCES.value)
        check_whole("part", part, 1, limits.WINDOW.value)
        check_whole("longest", longest, 2, limits.WINDOW.value)
        self.model = model.eval()
        self.queue, self.part, self.longest, self.cache = queue, part, longest, cache
        self.slots = Slots(model, slots)
        self.counts = Counts()
        self._device = next(model.parameters()).device
        encoder = model.encoder
        self._vocabulary = encoder.embedding.num_embeddings if isinstance(encoder, TokenEncoder) else None
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._reading: _Reading | None = None
        self._active: list[Ticket] = []  # by slot
        self._asked = threading.Condition()

    @property
    def capacity(self) -> int:
        """Requests that may be there at once."""
        return self.queue + self.slots.size

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that have begun and not ended: answers in the batch, and a prompt that is being read.

        Whoever is told of an end may ask again at once, though the slot is free only when the step has ended.
        """
        return sum(ticket.finished is None for ticket in [*self._active]) + (self._reading is not None)

    def ask(self, request: Request, listen: Callable[[Ticket], None] | None = None) -> Ticket:
        """Queue a request; from any thread.

        listen: called after each new token and at the end, by the thread that steps; it is quick and raises nothing.

        Raises Full where too many wait, ConfigError for a prompt that is too long or has ids that the model lacks.
        """
        length = len(request.prompt)
        if length + request.max_new_tokens > self.longest:
            raise ConfigError(
                f"A prompt of {length:,} tokens and {request.max_new_tokens:,} new ones are more than the "
                f"{self.longest:,} that are allowed together. Shorten the prompt, or ask for fewer tokens."
            )
        if request.prompt.min() < 0 or (self._vocabulary is not None and request.prompt.max() >= self._vocabulary):
            raise ConfigError("The prompt has token ids that the model lacks. Use those of its own tokenizer.")
        if request.settings.penalises:
            check_one_pick(self.model, PENALTIES)
        ticket = Ticket(request, listen)
        with self._asked:
            if len(self._waiting) + self.active >= self.capacity:
                self.counts.refused += 1
                raise Full(f"{len(self._waiting):,} requests wait already, as many as may. Ask again later.")
            self._waiting.append(ticket)
            self._asked.notify_all()
        return ticket

    def wait(self, seconds: float) -> None:
        """Wait until there is something to do, or so long."""
        with self._asked:
            self._asked.wait_for(lambda: self.busy, seconds)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._active or self._reading is not None)

    @torch.no_grad()
    def step(self) -> bool:
        """Go on by a part of a prompt and a token of each answer. Returns whether there is more to do.

        What goes wrong with the model's computation ends the requests that it was for.
        """
        self._drop_cancelled()
        self._read()
        self._decode()
        self.counts.steps += 1
        return self.busy

    def end_all(self) -> None:
        """Cancel all requests, and end them now. By the thread that steps, or when none does."""
        for ticket in [*self._waiting, *self._active, *([self._reading.ticket] if self._reading else [])]:
            ticket.cancel()
        self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        for slot in range(len(self._active) - 1, -1, -1):
            if self._active[slot].cancelled:
                self._end(self._leave(slot), "cancelled")
        if self._reading is not None and self._reading.ticket.cancelled:
            ticket, self._reading = self._reading.ticket, None
            self._end(ticket, "cancelled")
        with self._asked:
            dropped = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in dropped:
                self._waiting.remove(ticket)
        for ticket in dropped:
            self._end(ticket, "cancelled")

    def _end(self, ticket: Ticket, why: str, error: Exception | None = None) -> None:
        if why == "cancelled":
            self.counts.cancelled += 1
            ticket.end("cancelled")
        else:
            self.counts.failed += 1
            ticket.end("failed", error)

    def _leave(self, slot: int) -> Ticket:
        """Free a slot, whose place the last one takes."""
        self.slots.leave(slot)
        ticket, last = self._active[slot], self._active.pop()
        if slot < len(self._active):
            self._active[slot] = last
        return ticket

    def _read(self) -> None:
        """Read prompts, in their order, `part` tokens of them."""
        left = self.part
        while left > 0:
            if self._reading is None:
                with self._asked:
                    if not self._waiting or len(self._active) == self.slots.size:
                        return
                    self._reading = _Reading(self._waiting.popleft())
                self._begin(self._reading)
            reading = self._reading
            try:
                left -= self._read_part(reading, left)
                if reading.at == len(reading.ticket.request.prompt):
                    self._reading = None
                    self._join(reading)
                    left -= 1  # also prompts that are known take time
            except Exception as error:  # one request's trouble is not the others'
                self._reading = None
                self._end(reading.ticket, "failed", error)

    def _begin(self, reading: _Reading) -> None:
        prompt = reading.ticket.request.prompt
        self.counts.prompt_tokens += len(prompt)
        known = None if self.cache is None else self.cache.longest(prompt)
        if known is not None:
            reading.at, reading.state, reading.hidden = known.length, known.state, known.hidden
            reading.ticket.known = known.length

    def _read_part(self, reading: _Reading, most: int) -> int:
        """Read on, to where a state is to be kept at most. Returns the number of tokens."""
        prompt = reading.ticket.request.prompt
        stop = min(len(prompt), reading.at + most)
        if self.cache is not None:
            stop = min(stop, (reading.at // self.cache.every + 1) * self.cache.every)
        if (count := stop - reading.at) == 0:
            return 0
        part = torch.from_numpy(prompt[reading.at : stop].astype(np.int64)).to(self._device)
        x = self.model.encoder(part[None], None)
        hidden, reading.state = self.model.backbone(x, state=reading.state, return_state=True)
        reading.at, reading.hidden = stop, hidden[:, -1:]
        self.counts.run += count
        if self.cache is not None and (stop == len(prompt) or stop % self.cache.every == 0):
            self.cache.keep(prompt[:stop], reading.state or (), reading.hidden)
        return count

    def _join(self, reading: _Reading) -> None:
        """The first token of an answer; if there are more to come, it gets a slot."""
        assert reading.hidden is not None
        assert reading.state is not None
        self._add([reading.ticket], self.model.told(reading.hidden)[:, -1])
        if reading.ticket.finished is None:
            self.slots.enter(reading.state)
            self._active.append(reading.ticket)

    def _decode(self) -> None:
        if not self._active:
            return
        try:
            logits = self.slots.step([ticket.tokens[-1] for ticket in self._active])
            self._add(self._active, logits)
        except Exception as error:
            while self._active:
                ticket = self._leave(len(self._active) - 1)
                if ticket.finished is None:
                    self._end(ticket, "failed", error)
            return
        for slot in range(len(self._active) - 1, -1, -1):
            ticket = self._active[slot]
            self._keep(slot, ticket)
            if ticket.finished is not None:
                self._leave(slot)

    def _keep(self, slot: int, ticket: Ticket) -> None:
        """Keep an answer's state every K tokens and where it ends, for prompts that begin with it."""
        read = len(ticket.request.prompt) + len(ticket.tokens) - 1  # its last token has not been read
        if self.cache is None or ticket.finished == "failed":
            return
        if ticket.finished is not None or read % self.cache.every == 0:
            tokens = np.concatenate([ticket.request.prompt.astype(np.int64), ticket.tokens[:-1]])
            self.cache.keep(tokens, self.slots.state_of(slot), None)

    def _add(self, tickets: list[Ticket], told: Tensor) -> None:
        """A token to each answer from what the head tells, `(answers, ...)`; those with equal settings are sampled
        together."""
        groups: dict[Settings, list[int]] = {}
        for row, ticket in enumerate(tickets):
            groups.setdefault(ticket.request.settings, []).append(row)
        finite = told.amax(-1).isfinite()
        chosen = torch.zeros(len(tickets), dtype=torch.int64, device=told.device)
        for settings, rows in groups.items():
            some = None if len(groups) == 1 else torch.tensor(rows, device=told.device)
            drawn = self._drawn(told if some is None else told[some], settings, [tickets[row] for row in rows])
            if some is None:
                chosen = drawn
            else:
                chosen[some] = drawn
        for ticket, token, fine in zip(tickets, *torch.stack([chosen, finite.long()]).tolist(), strict=True):
            if not fine:
                self._end(ticket, "failed", not_finite())
                continue
            self.counts.new_tokens += 1
            try:
                ticket.add(token)
            except Exception as error:  # of what looks at its tokens
                self._end(ticket, "failed", error)
                continue
            if ticket.finished is not None:
                self.counts.answered += 1

    def _drawn(self, told: Tensor, settings: Settings, tickets: list[Ticket]) -> Tensor:
        """`(answers,)` int64: a token of each, all with these settings."""

        def pick(logits: Tensor) -> Tensor:
            uniform = torch.tensor([ticket.draw() for ticket in tickets], dtype=torch.float64, device=told.device)
            if settings.penalises:
                logits = torch.stack([ticket.penalised(row) for ticket, row in zip(tickets, logits, strict=True)])
            return sample(logits, settings.temperature, settings.top_k, settings.top_p, uniform, settings.min_p)

        draw = getattr(self.model.head, "draw", None)
        if draw is None:  # a plugin's
            return pick(told)
        token: Tensor = draw(told, pick)
        return token
