"""Prompts that are being read: parts of several at once, from the states of what is known of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from mambaseq.serving.parts import Parts
from mambaseq.serving.prefixes import PrefixCache
from mambaseq.serving.requests import Ticket
from mambaseq.serving.states import Groups


@dataclasses.dataclass(eq=False)
class Reading:
    """A prompt that is being read: the state behind its first `at` tokens, and the backbone's output at the last of
    them, `(1, 1, d_model)`."""

    ticket: Ticket
    at: int = 0
    state: Groups | None = None
    hidden: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.ticket.request.prompt)


class Readings:
    """Prompts that are being read, in the order in which they began.

    ran: tokens that the last run has read.
    """

    def __init__(self, parts: Parts, cache: PrefixCache | None) -> None:
        self._parts, self._cache = parts, cache
        self._all: list[Reading] = []
        self._behind: dict[Ticket, tuple[Reading, int]] = {}  # which prompt another waits for, and up to where
        self.ran = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Reading]:
        return iter(self._all)

    @property
    def next(self) -> int:
        """Tokens that can be read at once."""
        return sum(self._stop(reading) - reading.at for reading in self._all)

    def begin(self, ticket: Ticket) -> bool:
        """Begin to read a prompt. Returns False where it is better to wait: another one begins alike, and the state
        behind what they share will be kept."""
        if (wait := self._behind.get(ticket)) is not None:
            if wait[0] in self._all and wait[0].at < wait[1]:
                return False
            del self._behind[ticket]
        reading = Reading(ticket)
        if self._cache is not None:
            known = self._cache.longest(ticket.request.prompt)
            if known is not None:
                reading.at, reading.state, reading.hidden = known.length, known.state, known.hidden
            for other in self._all:
                shared = self._to_be_kept(ticket.request.prompt, other)
                if shared > max(reading.at, other.at):
                    self._behind[ticket] = other, shared
                    return False
        ticket.known = reading.at
        self._all.append(reading)
        return True

    def _to_be_kept(self, prompt: np.ndarray, other: Reading) -> int:
        """The most of the first tokens that another prompt has in common with this one and behind which its state is
        kept when it has been read."""
        assert self._cache is not None
        theirs = other.ticket.request.prompt
        if prompt[0] != theirs[0]:  # most do not begin alike, and comparing all of all takes time
            return 0
        most = min(len(prompt), len(theirs))
        differ = np.flatnonzero(prompt[:most] != theirs[:most])
        shared = int(differ[0]) if len(differ) else most
        return shared if shared == len(theirs) else shared - shared % self._cache.every

    def run(self, most: int) -> list[tuple[Reading, Exception]]:
        """Read at most so many tokens, at once. Returns those whose computation failed, which are dropped: one
        request's trouble is not the others'."""
        pack: list[tuple[Reading, int]] = []
        most = min(most, self._parts.tokens)
        for reading in self._all:
            if len(pack) == self._parts.sequences:
                break
            if (stop := min(self._stop(reading), reading.at + most)) > reading.at:
                pack.append((reading, stop))
                most -= stop - reading.at
        self.ran = 0
        try:
            self._run(pack)
            return []
        except Exception as error:
            if len(pack) == 1:
                self._all.remove(pack[0][0])
                return [(pack[0][0], error)]
        failed = []
        for reading, stop in pack:
            try:
                self._run([(reading, stop)])
            except Exception as error:
                self._all.remove(reading)
                failed.append((reading, error))
        return failed

    def whole(self) -> list[Reading]:
        """Take out those that have been read."""
        found = [reading for reading in self._all if reading.at == reading.length]
        self._all = [reading for reading in self._all if reading.at < reading.length]
        return found

    def dropped(self) -> list[Reading]:
        """Take out those that were cancelled."""
        found = [reading for reading in self._all if reading.ticket.cancelled]
        self._all = [reading for reading in self._all if not reading.ticket.cancelled]
        self._behind = {ticket: wait for ticket, wait in self._behind.items() if not ticket.cancelled}
        return found

    def clear(self) -> None:
        """Forget all. The device is not used."""
        self._all.clear()
        self._behind.clear()

    def _stop(self, reading: Reading) -> int:
        """How far a prompt can be read at once: to where a state is kept."""
        if self._cache is None:
            return reading.length
        return min(reading.length, (reading.at // self._cache.every + 1) * self._cache.every)

    def _run(self, pack: Sequence[tuple[Reading, int]]) -> None:
        """Read on, each up to its stop, in one row."""
        if not pack:
            return
        parts = [reading.ticket.request.prompt[reading.at : stop] for reading, stop in pack]
        states, hidden = self._parts.read(parts, [reading.state for reading, _ in pack])
        for number, (reading, stop) in enumerate(pack):
            self.ran += stop - reading.at
            reading.at, reading.state = stop, states[number]
            reading.hidden = hidden[number : number + 1]
            if self._cache is not None and (stop == reading.length or stop % self._cache.every == 0):
                self._cache.keep(reading.ticket.request.prompt[:stop], reading.state, reading.hidden)
