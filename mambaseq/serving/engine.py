"""Continuous batching: requests join and leave a batch of states between any two steps, and prompts are read in parts
beside it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq import limits
from mambaseq.encoders import TokenEncoder
from mambaseq.errors import ConfigError, UserError, cut
from mambaseq.generation.checks import PENALTIES, check_one_pick, continues, not_finite
from mambaseq.limits import check_whole
from mambaseq.models import SequenceModel
from mambaseq.serving.parts import Parts
from mambaseq.serving.picking import Picker
from mambaseq.serving.prefixes import PrefixCache
from mambaseq.serving.reading import Reading, Readings
from mambaseq.serving.requests import Request, Ticket
from mambaseq.serving.slots import Slots
from mambaseq.serving.states import Groups
from mambaseq.serving.warming import WarmUp, prepared, sizes_up_to

_LOG = logging.getLogger(__name__)
_ROW, _TOGETHER = 2048, 16  # tokens and prompts in a row of a fixed size, at most


class Full(UserError):
    """As many requests wait as may."""


class Closed(UserError):
    """Nobody steps the engine any more."""


class Fault(NamedTuple):
    """What went wrong. kind: the exception's type. message: the first line that it says, cut."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


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
class _Answer:
    """An answer that has a slot. picked: its tokens so far, some of which nobody may have looked at yet."""

    ticket: Ticket
    prompt: int
    most: int
    picked: int = 0

    @property
    def read(self) -> int:
        """Tokens, the prompt's too, that its state has read: all but the last that was picked."""
        return self.prompt + self.picked - 1


@dataclasses.dataclass
class _Picked:
    """Tokens that were picked on the device, and whether what the head told was finite: `(2, n or more)` int64, which
    are there when the event has come. states: of some answers, by their row, with the number of tokens read."""

    tickets: list[Ticket]
    found: Tensor
    event: torch.cuda.Event | None
    states: dict[int, tuple[int, Groups]] = dataclasses.field(default_factory=dict)


class Engine:
    """Answers requests together; made for one thread that steps, and any that ask and cancel.

    A step ends what was cancelled, reads at most `part` tokens of prompts, and adds one token to each answer in the
    batch. An answer is the one that `generate` gives for its prompt, settings, seed and number, whatever else is in the
    batch: as exactly as a model's outputs are those of a batch of another size, which on most devices is up to the
    last bits.

    Args:
        model: a causal one of tokens whose states have a fixed size; in eval mode from now on.
        slots: answers that are made at once. queue: requests that may wait. part: tokens of prompts in a step; None
            takes 512, and 2,048 on a GPU.
        longest: most tokens of a prompt and its answer together.
        cache: states of prompts to be found again; None keeps none.
        late: look at a step's tokens when the next one has been given to the device, which so never waits; an answer
            that ends by its tokens then takes one step more, which nobody sees. None: on a GPU.
        fixed: compute for few numbers of answers and of tokens of prompts, filled up to the next one, so that
            `warm_up` can compile all that requests will need, and capture it in CUDA graphs. None: on a GPU.

    Attributes:
        warmed: what `warm_up` did, None before.
        fault: what went wrong with the last computation; None where it went well.

    Raises ConfigError for a model that cannot be served, and for numbers out of range.
    """

    def __init__(
        self,
        model: SequenceModel,
        *,
        slots: int = 16,
        queue: int = 64,
        part: int | None = None,
        longest: int = 65_536,
        cache: PrefixCache | None = None,
        late: bool | None = None,
        fixed: bool | None = None,
    ) -> None:
        if not continues(model, "tokens") or getattr(model.head, "codes", 0) > 0:
            raise ConfigError(
                "Only a causal model with an lm head of one token a position can be served; this one cannot. Train one "
                "with the head lm and a causal backbone, such as residual."
            )
        model.check_stateful()
        self._device = next(model.parameters()).device
        on_gpu = self._device.type == "cuda"
        part = (2048 if on_gpu else 512) if part is None else part
        check_whole("slots", slots, 1, limits.BATCH.value)
        check_whole("queue", queue, 0, limits.SEQUENCES.value)
        check_whole("part", part, 1, limits.WINDOW.value)
        check_whole("longest", longest, 2, limits.WINDOW.value)
        self.model = model.eval()
        self.queue, self.part, self.longest, self.cache = queue, part, longest, cache
        self.late = on_gpu if late is None else late
        self._fixed = on_gpu if fixed is None else fixed
        self.slots = Slots(model, slots, sizes_up_to(slots, 1) if self._fixed else None)
        self.counts = Counts()
        self.warmed: WarmUp | None = None
        self.fault: Fault | None = None
        self._closed: str | None = None
        encoder = model.encoder
        self._vocabulary = encoder.embedding.num_embeddings if isinstance(encoder, TokenEncoder) else None
        self._waiting: collections.deque[Ticket] = collections.deque()
        # all that have not ended, and some that have: tickets move between the other lists while others ask
        self._open: list[Ticket] = []
        most = min(part, longest)
        rows = sizes_up_to(min(most, _ROW), 32) if self._fixed else None
        self._parts = Parts(model, self.slots.layout, most, rows, min(slots, _TOGETHER) if self._fixed else slots)
        self._readings = Readings(self._parts, cache)
        self._picker = Picker(model, slots, self._fixed)
        self._active: list[_Answer] = []  # by slot
        self._unseen: list[_Picked] = []
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
        """Requests that have begun and not ended: answers in the batch, and prompts that are being read.

        Whoever is told of an end may ask again at once, though the slot is free only when the step has ended.
        """
        return sum(answer.ticket.finished is None for answer in [*self._active]) + len(self._readings)

    def ask(self, request: Request, listen: Callable[[Ticket], None] | None = None) -> Ticket:
        """Queue a request; from any thread.

        listen: called after each new token and at the end, by the thread that steps; it is quick and raises nothing.

        Raises Full where too many wait, Closed behind `close`, ConfigError for a prompt that is too long or has ids
        that the model lacks.
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
            if self._closed is not None:
                raise Closed(self._closed)
            self._open = [one for one in self._open if one.finished is None]
            if len(self._open) >= self.capacity:
                self.counts.refused += 1
                raise Full(f"{len(self._waiting):,} requests wait already, as many as may. Ask again later.")
            self._open.append(ticket)
            self._waiting.append(ticket)
            self._asked.notify_all()
        return ticket

    def wait(self, seconds: float) -> None:
        """Wait until there is something to do, or so long, or until it is woken."""
        with self._asked:
            if not self.busy:
                self._asked.wait(seconds)

    def wake(self) -> None:
        """End a wait; from any thread."""
        with self._asked:
            self._asked.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._active or self._unseen or len(self._readings))

    @torch.no_grad()
    def step(self) -> bool:
        """Go on by a part of a prompt and a token of each answer. Returns whether there is more to do.

        What goes wrong with the model's computation ends the requests that it was for.
        """
        with self._on_device():
            self._drop_cancelled()
            unseen = len(self._unseen)
            self._read()
            self._decode()
            for _ in range(unseen):
                self._look(self._unseen[0])
                del self._unseen[0]  # not before: `end_all` must know of it where the look fails
        self.counts.steps += 1
        return self.busy

    @torch.no_grad()
    def warm_up(self, seconds: float = 120.0) -> WarmUp:
        """Compile and capture what steps need, so that requests do not wait for it. Before any is there. After so many
        seconds no further shape is begun; requests then wait for those that are left."""
        counts, lengths = self.slots.sizes or (1, self.slots.size), self._parts.sizes or (1, self._parts.tokens)

        def prepare(count: int) -> str | None:
            _, hidden = self._parts.read([np.zeros(1, dtype=np.int64)], [None])
            self.model.told(hidden.expand(count, -1, -1))  # of those that join
            told, why_not = self.slots.warm_up(count)
            return self._picker.warm_up(told) or why_not

        # large ones first: the others fit into their memory
        shapes = [functools.partial(self._parts.warm_up, length) for length in reversed(lengths)]
        shapes += [functools.partial(prepare, count) for count in reversed(counts)]
        with self._on_device():
            self.warmed = prepared(shapes, seconds)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        return self.warmed

    def _on_device(self) -> contextlib.AbstractContextManager[None]:
        """Kernels and events go to the current device, which is each thread's own."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    @torch.no_grad()
    def probe(self) -> None:
        """Run a token, to see whether what failed works again, and say so in `fault`. By the thread that steps, where
        nothing is asked."""
        try:
            with self._on_device():
                token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
                hidden, _ = self.model.backbone(self.model.encoder(token, None), return_state=True)
                self.model.told(hidden).amax().item()  # waits for the device
        except Exception as error:
            self.failed(error)
        else:
            self.fault = None

    def failed(self, error: Exception) -> None:
        """Note what went wrong with a computation, and log it whole, once until another goes well or fails otherwise.
        What a user can mend is of one request, and no fault."""
        if isinstance(error, UserError):
            return
        fault = Fault(type(error).__name__, cut(str(error).strip().partition("\n")[0], 300))
        if fault != self.fault:
            _LOG.error("A computation failed.", exc_info=error)
        self.fault = fault

    def close(self, reason: str) -> None:
        """Refuse what is asked from now on, for this reason, and end all requests; see `end_all`."""
        with self._asked:
            self._closed = reason if self._closed is None else self._closed
        self.end_all()

    @property
    def closed(self) -> str | None:
        """Why nothing is answered any more; None while it is."""
        return self._closed

    def end_all(self) -> None:
        """Cancel all requests, and end them now; the device, which may have failed for good, is not used. By the thread
        that steps, or when none does."""
        with self._asked:
            self._waiting.clear()
            tickets = [*self._open]
        for ticket in tickets:
            ticket.cancel()
            self._end(ticket, "cancelled")
        self._unseen.clear()
        self._readings.clear()
        self._cut(0)

    def _drop_cancelled(self) -> None:
        for slot in range(len(self._active) - 1, -1, -1):
            if self._active[slot].ticket.cancelled:
                self._end(self._leave(slot), "cancelled")
        for reading in self._readings.dropped():
            self._end(reading.ticket, "cancelled")
        with self._asked:
            dropped = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in dropped:
                self._waiting.remove(ticket)
        for ticket in dropped:
            self._end(ticket, "cancelled")

    def _end(self, ticket: Ticket, why: Literal["cancelled", "failed"], error: Exception | None = None) -> None:
        if ticket.finished is not None:
            return
        if why == "cancelled":
            self.counts.cancelled += 1
        else:
            self.counts.failed += 1
        ticket.end(why, error)

    def _leave(self, slot: int) -> Ticket:
        """Free a slot, whose place the last one takes."""
        self.slots.leave(slot)
        self._picker.leave(slot)
        answer, last = self._active[slot], self._active.pop()
        if slot < len(self._active):
            self._active[slot] = last
        return answer.ticket

    def _cut(self, count: int) -> None:
        """Free all slots but the first `count`, also those that were only entered in part. The device is not used."""
        del self._active[count:]
        self.slots.cut(len(self._active))
        self._picker.cut(len(self._active))

    def _read(self) -> None:
        """Read `part` tokens of prompts, several at once, those that came first before the others."""
        left = self.part
        while left > 0:
            self._begin(left)
            if not len(self._readings):
                return
            before = self.counts.run
            failed = self._readings.run(left)
            self.counts.run += self._readings.ran
            for reading, error in failed:
                self.failed(error)
                self._end(reading.ticket, "failed", error)
            left -= max(self.counts.run - before, 1)  # also prompts that are known take time
            if whole := self._readings.whole():
                self._join(whole)

    def _begin(self, most: int) -> None:
        """Begin to read prompts that wait, in their order, as long as there are slots for them and fewer than `most`
        tokens to read. One that begins as another does waits for it, if that one's states are to be kept."""
        with self._asked:
            waiting = [] if self._full() else [*self._waiting]
        for ticket in waiting:
            if self._full() or self._readings.next >= most:
                return
            if self._readings.begin(ticket):
                with self._asked:
                    self._waiting.remove(ticket)
                self.counts.prompt_tokens += len(ticket.request.prompt)

    def _full(self) -> bool:
        return len(self._active) + len(self._readings) >= self.slots.size

    def _join(self, readings: list[Reading]) -> None:
        """Prompts that were read get slots, and their answers the first token."""
        first = len(self._active)
        try:
            hidden = torch.cat([reading.hidden for reading in readings if reading.hidden is not None])
            told = self.model.told(hidden)[:, -1]
            self.slots.enter([reading.state for reading in readings if reading.state is not None])
            for reading in readings:
                self._picker.enter(reading.ticket.request)
                self._active.append(_Answer(reading.ticket, reading.at, reading.ticket.request.max_new_tokens))
            self._pick(told, first)
        except Exception as error:
            self._fail(first, [reading.ticket for reading in readings], error)

    def _decode(self) -> None:
        if not self._active:
            return
        answers = [*self._active]
        try:
            self._pick(self.slots.step(self._picker.tokens), 0, stays=True)
        except Exception as error:
            self._fail(0, [answer.ticket for answer in answers], error)

    def _fail(self, first: int, tickets: list[Ticket], error: Exception) -> None:
        """Free the slots from `first` on, and end the answers that have them, or had them when the step began."""
        self.failed(error)
        self._cut(first)
        for ticket in tickets:
            self._end(ticket, "failed", error)

    def _pick(self, told: Tensor, first: int, stays: bool = False) -> None:
        """A token to each answer from the slot `first` on, by what the head tells of them, `(answers or more, ...)`.
        stays: see `Picker.pick`."""
        answers = self._active[first:]
        found, event = self._to_host(self._picker.pick(told, first, stays))
        picked = _Picked([answer.ticket for answer in answers], found, event)
        every = 0 if self.cache is None else self.cache.every
        ended = []
        for row, answer in enumerate(answers):
            answer.picked += 1
            is_last = answer.picked == answer.most
            if every and answer.picked > 1 and (is_last or not answer.read % every):
                picked.states[row] = answer.read, self.slots.state_of(first + row)
            if is_last:
                ended.append(first + row)
        for slot in reversed(ended):
            self._leave(slot)
        if self.late:
            self._unseen.append(picked)
        else:
            self._look(picked)

    def _to_host(self, found: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy on the host, which is there when the event has come."""
        if not found.is_cuda:
            return found, None
        host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        host.copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def _look(self, picked: _Picked) -> None:
        """Add tokens to their answers, and free the slots of those that so end."""
        if picked.event is not None:
            picked.event.synchronize()
        tokens, finite = picked.found[:, : len(picked.tickets)].tolist()
        for row, (ticket, token) in enumerate(zip(picked.tickets, tokens, strict=True)):
            if ticket.finished is not None:
                continue
            if not finite[row]:
                self._end(ticket, "failed", not_finite())
                continue
            self.counts.new_tokens += 1
            try:
                ticket.add(token)
            except Exception as error:  # of what looks at its tokens
                if not isinstance(error, UserError):
                    _LOG.error("An answer failed.", exc_info=error)
                self._end(ticket, "failed", error)
                continue
            if row in picked.states:
                self._keep(ticket, *picked.states[row])
            if ticket.finished is not None:
                self.counts.answered += 1
        if any(finite):
            self.fault = None
        for slot in range(len(self._active) - 1, -1, -1):
            answer = self._active[slot]
            if answer.ticket.finished is not None:
                # where the first token ends it, the state may have read one behind it
                known = 0 < answer.read - answer.prompt <= len(answer.ticket.tokens)
                if answer.ticket.finished == "stop" and known:
                    self._keep(answer.ticket, answer.read, self.slots.state_of(slot))
                self._leave(slot)

    def _keep(self, ticket: Ticket, read: int, state: Groups) -> None:
        """Keep the state behind the first `read` tokens of a prompt and its answer, for prompts that begin with
        them: one every K tokens, and one where the answer ends."""
        if self.cache is not None:
            tokens = np.concatenate([ticket.request.prompt.astype(np.int64), np.array(ticket.tokens, dtype=np.int64)])
            self.cache.keep(tokens[:read], state, None)
