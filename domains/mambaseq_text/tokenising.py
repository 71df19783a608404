"""Tokenises texts once into a store: in several processes, part by part, so that a killed run goes on."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from mambaseq.data.cache import Unchanged
from mambaseq.data.growing import Part, grown
from mambaseq.data.store import TokenStore
from mambaseq.errors import ConfigError, DataError, UserError
from mambaseq.limits import WORKERS
from mambaseq.resources import cores
from mambaseq_text.tokenization import TextTokenizer

PART = 1 << 23
"""Characters of text that are tokenised, and kept, at once."""

_ALONE = 2  # parts that this process makes before others would have begun

Texts = list[tuple[str, bool, bool, str]]
"""Text, whether a document begins and ends with it, and what ends documents that have no mark."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a record.

    record: the name of the record that begins here; None continues the one before. text, begins, ends, joint: see
    `TextTokenizer.part`. place: plain values from which reading goes on behind it. more: whether it counts for
    `max_tokens`.
    """

    record: str | None
    text: str
    place: Any
    begins: bool = True
    ends: bool = True
    joint: str = ""
    more: bool = False


class Reading:
    """What reads pieces: `pieces(place)` gives them from a place on, None for the beginning; `found()` what has been
    found since the last call, for the store. `enough()` is called when no further pieces with `more` are wanted; they
    are left out if they come nevertheless."""

    def pieces(self, place: Any) -> Iterator[Piece]:
        raise NotImplementedError

    def found(self) -> list[Any]:
        return []

    def enough(self) -> None:
        pass


def check_workers(workers: int | None) -> None:
    """Raise UserError for a number of processes that makes no sense."""
    if workers is not None and workers < 0:
        raise ConfigError(f"data.workers must be at least 0, not {workers}. null takes as many as there are cores.")
    WORKERS.check(workers or 0, "data.workers")


def tokenised(
    label: str,
    reading: Reading,
    tokenizer: TextTokenizer,
    meta: dict[str, Any],
    *,
    counts: bool = False,
    workers: int | None = None,
    max_tokens: int = 0,
    unchanged: Unchanged | None = None,
) -> TokenStore:
    """The store of what `reading` gives, from the cache if it is there (see `growing.grown`).

    counts: store the byte counts of the tokens (uint32) in the place of their ids. workers: processes; None as many as
    this one may use cores, 0 for this one alone. max_tokens: of pieces with `more`, 0 for all: no further part is begun
    once there are as many.
    """
    parts = _Parts(reading, tokenizer, counts, workers, max_tokens)
    dtype = "uint32" if counts else tokenizer.dtype
    return grown(label, parts, dtype, {**meta, "part": PART}, unchanged=unchanged)


class _Parts:
    def __init__(
        self, reading: Reading, tokenizer: TextTokenizer, counts: bool, workers: int | None, max_tokens: int
    ) -> None:
        self.reading, self.tokenizer, self.counts, self.max_tokens = reading, tokenizer, counts, max_tokens
        self.workers = cores() if workers is None else workers

    def __call__(self, place: Any) -> Iterator[Part]:
        taken, place, over = place or (0, None, False)
        if over:
            return
        if self._has_enough(taken):
            self.reading.enough()
        with contextlib.closing(_progress()) as told, contextlib.closing(self._made(self._cut(place))) as made:
            for part, tokens in made:
                more = bool(part.pieces) and part.pieces[0].more
                if more and self._has_enough(taken):
                    continue
                if more:
                    taken += sum(map(len, tokens))
                    if self._has_enough(taken):
                        self.reading.enough()
                told.update(sum(len(piece.text) for piece in part.pieces))
                records = [(piece.record, ids) for piece, ids in zip(part.pieces, tokens, strict=True)]
                place = part.pieces[-1].place if part.pieces else place
                yield Part(records, [taken, place, part.last], part.found)

    def _made(self, cut: Iterator[_Cut]) -> Generator[tuple[_Cut, list[np.ndarray]]]:
        """Each part with its tokens, in order."""
        alone = itertools.islice(cut, _ALONE) if self.workers and type(self.tokenizer).__module__ != "__main__" else cut
        for part in alone:
            yield part, tokens_of(part.texts(), self.tokenizer, self.counts)
        if (following := next(cut, None)) is not None:
            with _Processes(self.tokenizer, self.counts, self.workers) as processes:
                yield from processes.made(itertools.chain([following], cut))

    def _has_enough(self, taken: int) -> bool:
        return 0 < self.max_tokens <= taken

    def _cut(self, place: Any) -> Iterator[_Cut]:
        """Pieces of one kind, about `PART` characters together. A last part says that all has been read, also what gave
        no pieces."""
        held, size = _Cut(), 0
        for piece in self.reading.pieces(place):
            found = self.reading.found()  # before this piece
            if held.pieces and held.pieces[0].more != piece.more:
                yield held
                held, size = _Cut(), 0
            held.pieces.append(piece)
            held.found.extend(found)
            size += len(piece.text)
            if size >= PART:
                yield held
                held, size = _Cut(), 0
        held.found.extend(self.reading.found())
        held.last = True
        if held.pieces or held.found:
            yield held


@dataclasses.dataclass
class _Cut:
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    found: list[Any] = dataclasses.field(default_factory=list)
    last: bool = False

    def texts(self) -> Texts:
        return [(piece.text, piece.begins, piece.ends, piece.joint) for piece in self.pieces]


def _progress() -> Any:
    from tqdm import tqdm

    return tqdm(desc="tokenised", unit="B", unit_scale=True, disable=None, leave=False)


def tokens_of(texts: Texts, tokenizer: TextTokenizer, counts: bool) -> list[np.ndarray]:
    """The ids, or byte counts, of each text."""
    return [tokenizer.part(*text)[int(counts)] for text in texts]


class _Processes:
    """Processes that tokenise, each with a thread here that speaks to it. Not forked: the library's threads and torch's
    do not survive that; and not `multiprocessing`, which would run the user's script again."""

    def __init__(self, tokenizer: TextTokenizer, counts: bool, workers: int) -> None:
        self._task = pickle.dumps((tokenizer, counts))
        self.workers, self._own = workers, threading.local()
        self._all: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(workers, "tokenising")

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._all:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.communicate()

    def made(self, cut: Iterator[_Cut]) -> Iterator[tuple[_Cut, list[np.ndarray]]]:
        """Each with its tokens, in order. At most two for each process wait, so that memory does not grow."""
        waiting: collections.deque[tuple[_Cut, Future[list[np.ndarray]]]] = collections.deque()
        for part in cut:
            waiting.append((part, self._threads.submit(self._ask, part.texts())))
            if len(waiting) > 2 * self.workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()

    def _process(self) -> subprocess.Popen[bytes]:
        if not hasattr(self._own, "process"):
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TOKENIZERS_PARALLELISM": "false",
            }
            process = subprocess.Popen(
                [sys.executable, "-c", "from mambaseq_text.tokenising import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            self._own.process = process
            self._all.append(process)
            assert process.stdin is not None
            process.stdin.write(self._task)
            process.stdin.flush()
        found: subprocess.Popen[bytes] = self._own.process
        return found

    def _ask(self, texts: Texts) -> list[np.ndarray]:
        process = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(texts, process.stdin, protocol=5)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"A process that tokenises has ended ({process.poll()}): it was killed, or memory was short. Lower "
                "data.workers and begin again; what was done is kept."
            ) from error
        if isinstance(answer, Exception):
            raise answer
        lengths, tokens = answer
        return np.split(tokens, np.cumsum(lengths)[:-1])


def serve() -> None:
    """What such a process does: a tokenizer comes first, then lists of texts, until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks says when it is over
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    tokenizer, counts = pickle.load(source)
    while True:
        try:
            texts = pickle.load(source)
        except EOFError:
            return
        answer: Any
        try:
            found = tokens_of(texts, tokenizer, counts)
            answer = [len(ids) for ids in found], np.concatenate(found)
        except Exception as error:
            answer = _sendable(error)
        pickle.dump(answer, answers, protocol=5)
        answers.flush()


def _sendable(error: Exception) -> Exception:
    """An error as it is, if it can be sent; otherwise one of a more general kind that says the same."""
    with contextlib.suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    for kind in (DataError, ConfigError, UserError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
