"""Answers that are means over both strands of DNA: of a sequence, and of its reverse complement turned back."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from mambaseq.checkpoints import LoadedModel
from mambaseq.data.records import Record
from mambaseq.errors import ConfigError, shown
from mambaseq.runs.answers import Answer, Found, NotFinite, Span
from mambaseq.runs.overlaps import Merger
from mambaseq.runs.tables import Column


class BothStrands(Answer):
    """The mean of what another `Answer` says of each window, and of the other strand of the same window.

    Positions are reversed and classes exchanged as the model's `strand_classes` say; probabilities, values, embeddings
    and bits are averaged. What one strand alone says (the first base of a language model's window) stays as it is.
    Raises ConfigError for a model whose tokenizer has no complement.
    """

    def __init__(self, answer: Answer, loaded: LoadedModel) -> None:
        complement = getattr(loaded.tokenizer, "complement", None)
        if complement is None:
            name = None if loaded.card.tokenizer is None else loaded.card.tokenizer["name"]
            raise ConfigError(
                f"--both-strands is for models of DNA: the tokenizer {shown(name)} of the model at {loaded.source} "
                "does not say which tokens are paired (complement). Leave it out."
            )
        super().__init__(loaded, answer.window)
        self.answer, self.complement = answer, np.asarray(complement)
        self.least, self.each, self.step, self.in_parts = answer.least, answer.each, answer.step, answer.in_parts
        self.whole, self.pads = answer.whole, answer.pads
        self.gathered, self.unknown = answer.gathered, answer.unknown

    def overlap(self, stride: int) -> None:
        self.answer.overlap(stride)
        self.window, self.stride = self.answer.window, stride

    def long(self, span: Span) -> bool:
        return self.answer.long(span)

    def spans(self, record: Record) -> Iterator[Span]:
        return self.answer.spans(record)

    def cells(self, values: np.ndarray) -> list[Column]:
        cells = self.answer.cells(values)
        self.columns = self.answer.columns
        return cells

    def _other(self, record: Record, span: Span) -> tuple[Record, Span]:
        """The span's other strand, without its last bin if that is not a full one: bins would not match."""
        stop = span.start + (span.stop - span.start) // self.step * self.step
        assert record.ids is not None
        ids = self.complement[record.ids[span.start : stop]][::-1]
        scored = None if record.scored is None else record.scored[span.start : stop][::-1]
        return dataclasses.replace(record, ids=ids, scored=scored), Span(0, len(ids))

    def _back(self, found: Found, stop: int) -> Found:
        """What was found for the other strand of tokens that end at `stop`, as of this one."""
        values = self.answer.turned(found.values)[::-1]
        known = None if found.known is None else found.known[::-1]
        return Found(stop - found.stop, stop - found.start, found.step, values, known)

    def _mean(self, one: Found, other: Found) -> Found:
        if self.each:
            merger = Merger()
            first, second = sorted((one, other), key=lambda found: found.start)
            merger.add(first)
            merger.add(second)
            (mean,) = merger.before()
            return mean
        known = [found.known is None or bool(found.known[0]) for found in (one, other)]
        if known[0] != known[1]:
            return one if known[0] else other
        return one._replace(values=(one.values + other.values) / 2)

    def answers(self, pieces: list[tuple[Record, Span]]) -> list[Found | NotFinite]:
        found = self.answer.answers(pieces)
        others = {number: self._other(*piece) for number, piece in enumerate(pieces)}
        others = {number: other for number, other in others.items() if other[1].stop >= self.least}  # a bin, at least
        turned = self.answer.answers(list(others.values())) if others else []
        for (number, (_, read)), other in zip(others.items(), turned, strict=True):
            one, (_, span) = found[number], pieces[number]
            if isinstance(other, NotFinite):
                found[number] = other
            elif not isinstance(one, NotFinite):
                found[number] = self._mean(one, self._back(other, span.start + read.stop))
        return found

    def parts(self, record: Record, span: Span) -> Iterator[Found]:
        other = self._other(record, span)
        if not self.each:
            (one,), (back,) = self.answer.parts(record, span), self.answer.parts(*other)
            yield self._mean(one, self._back(back, span.stop))
            return
        # the other strand is read from the end of the record, so its answers wait in a file
        with tempfile.TemporaryFile() as file:
            waiting = _Waiting(file)
            for back in self.answer.parts(*other):
                waiting.add(back)
            merger = Merger()
            done = span.start
            for found in self.answer.parts(record, span):
                if (same := waiting.read(span.stop - found.stop, span.stop - done)) is not None:
                    merger.add(self._back(same, span.stop))
                merger.add(found)
                yield from merger.before(found.stop)
                done = found.stop


class _Waiting:
    """Answers for positions, one behind the other, in a file: fp32 numbers, NaN where unknown."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._first: int | None = None
        self._stop = self._width = 0

    def add(self, found: Found) -> None:
        if self._first is None:
            self._first, self._width = found.start, found.values.shape[1]
        values = found.values.astype(np.float32)
        if found.known is not None:
            values[~found.known] = np.nan
        self._file.write(np.ascontiguousarray(values).data)
        self._stop = found.stop

    def read(self, start: int, stop: int) -> Found | None:
        """Those of [start, stop), as far as there are any."""
        assert self._first is not None
        start, stop = max(start, self._first), min(stop, self._stop)
        if stop <= start:
            return None
        self._file.seek((start - self._first) * self._width * 4)
        read = self._file.read((stop - start) * self._width * 4)
        values = np.frombuffer(read, dtype=np.float32).reshape(-1, self._width)
        known = ~np.isnan(values[:, 0])
        return Found(start, stop, 1, np.where(known[:, None], values, 0), None if known.all() else known)
