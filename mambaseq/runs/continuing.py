"""Prompts under conditions, continued in batches: what is generated comes piece by piece."""

from __future__ import annotations

import collections
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mambaseq.checkpoints import LoadedModel
from mambaseq.errors import ConfigError
from mambaseq.generation.beams import beam_search
from mambaseq.generation.checks import NotFinite
from mambaseq.generation.decode import stream
from mambaseq.generation.prompts import Prompts, Row, parts
from mambaseq.generation.reading import prefill
from mambaseq.generation.states import Begun
from mambaseq.generation.stopping import StopStrings
from mambaseq.generation.values import continue_values

AT_ONCE = 256  # sequences that are generated together: their states are in memory

Under = int | tuple[int, ...] | None  # see mambaseq.conditions


class Prompt(NamedTuple):
    """What is continued, `(length, ...)` whole numbers or `(length, channels)` float32, and under which conditions, ids
    or rows, [None] for a model that has none.

    given: what is known of what is added; see `mambaseq.generation.generate`. begun: what was read of it already, all
    of it.
    name: of its record. file: by which it is read again, as record `number`: its own, or a table that names a part of
    one. source: its own file, where a reader tells it.
    """

    values: Row
    conditions: Sequence[Under]
    given: np.ndarray | None = None
    name: str = ""
    number: int = 0
    begun: Begun | None = None
    file: str | None = None
    source: str | None = None


class Job(NamedTuple):
    """Samples `[first, stop)` of a prompt under a condition.

    place: among all (prompt, condition). earlier: how many samples prompts before it have that are equal to it, under
    the same condition.
    """

    place: int
    prompt: Prompt
    condition: Under
    first: int
    stop: int
    earlier: int


class Progress:
    """The bar: tokens of all sequences together and, of what takes time (sound), how much faster than real time they
    come. It counts from the first piece of a batch on, so that the reading of a prompt does not.

    rate: tokens of a second of sound, None for what takes no time. unit: what a token is.
    """

    def __init__(self, total: int, rate: float | None, unit: str, shown: bool) -> None:
        self._rate = rate
        self._bar = tqdm(total=total, unit=unit, unit_scale=True, disable=not shown, smoothing=0.1)
        self._seconds, self._tokens = 0.0, 0
        self._last: float | None = None

    def begin(self) -> None:
        """A batch begins, with its prompts."""
        self._last = None

    def add(self, tokens: int) -> None:
        import time

        now = time.monotonic()
        if self._last is not None:
            self._seconds, self._tokens = self._seconds + now - self._last, self._tokens + tokens
        self._last = now
        if self._rate and self._seconds:
            self._bar.set_postfix_str(f"{self.real_time:.1f}x real time", refresh=False)
        self._bar.update(tokens)

    @property
    def real_time(self) -> float:
        """How many times faster than real time, all sequences together; 0 if it is not known."""
        return self._tokens / self._seconds / self._rate if self._rate and self._seconds else 0.0

    def close(self) -> None:
        self._bar.close()


def batches(
    prompts: Sequence[Prompt], samples: int, begin: int = 0, *, even: bool = True, beams: int = 0, alone: bool = False
) -> Iterator[list[Job]]:
    """Jobs with one number of samples, at most `AT_ONCE` sequences together, those of the shortest prompts first.

    begin: the number of a prompt's first sample. even: only prompts of one length are in a batch; otherwise those to
        which one number of tokens is added. beams: of a search, whose states are in memory, too. alone: one sequence a
        batch."""
    most = 1 if alone else AT_ONCE
    by_shape: dict[tuple[int, int], list[Job]] = {}
    seen: collections.Counter[tuple[bytes, Under]] = collections.Counter()
    place = -1
    for prompt in prompts:
        key = _key(prompt.values)
        for condition in prompt.conditions:
            place += 1
            earlier = seen[key, condition] * samples
            seen[key, condition] += 1
            for first in range(begin, begin + samples, most):
                stop = min(first + most, begin + samples)
                job = Job(place, prompt, condition, first, stop, earlier)
                shape = len(prompt.values) if even else 0 if prompt.given is None else len(prompt.given)
                by_shape.setdefault((shape, stop - first), []).append(job)
    for (_, width), jobs in by_shape.items():
        jobs.sort(key=lambda job: len(job.prompt.values))
        at_once = max(1, most // max(width, beams))
        for start in range(0, len(jobs), at_once):
            yield jobs[start : start + at_once]


def n_sequences(jobs: Sequence[Sequence[Job]]) -> int:
    """How many sequences the batches of jobs make."""
    return sum(job.stop - job.first for batch in jobs for job in batch)


def _key(values: Row) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts(values):
        found.update(part.tobytes())
    return found.digest()


def numbers_of(batch: Sequence[Job]) -> torch.Tensor:
    """Which samples of each prompt are wanted, `(jobs, samples)` int64."""
    return torch.tensor([list(range(job.earlier + job.first, job.earlier + job.stop)) for job in batch])


def conditions_of(batch: Sequence[Job], place: torch.device) -> torch.Tensor | None:
    """The condition of each job, `(jobs,)` int64 ids or `(jobs, conditions)` rows; None where there is none."""
    if batch[0].condition is None:
        return None
    return torch.tensor([job.condition for job in batch], device=place)


def pieces(
    loaded: LoadedModel,
    jobs: Sequence[Sequence[Job]],
    count: int,
    place: torch.device,
    settings: dict[str, Any],
    progress: Progress,
) -> Iterator[tuple[int, np.ndarray]]:
    """What is added to the prompts of each batch of jobs as it comes, and the batch's number: `(jobs, samples, n, ...)`
    int64. A prompt whose samples are in several batches is read once."""
    read: tuple[list[Any], torch.Tensor] | None = None
    for number, batch in enumerate(jobs):
        progress.begin()
        width = batch[0].stop - batch[0].first
        given = [job.prompt.given for job in batch if job.prompt.given is not None]
        prompts, condition = Prompts([job.prompt.values for job in batch], place), conditions_of(batch, place)
        again = number + 1 < len(jobs) and _same(batch, jobs[number + 1])
        if not _same(batch, jobs[number - 1] if number else ()):
            read = None
        if "beams" in settings:
            yield number, _searched(loaded, batch, prompts, condition, count, settings)
            progress.add(len(batch) * count)
            continue
        if (begun := batch[0].prompt.begun) is not None:  # of the only prompt
            read = begun.state, begun.told
        if again and read is None:
            read = prefill(loaded.model, prompts, condition)
        with _source_told(loaded):
            for piece in stream(
                loaded.model,
                prompts,
                len(given[0]) if given else count,
                condition=condition,
                samples=width,
                numbers=numbers_of(batch),
                given=torch.from_numpy(np.stack(given)) if given else None,
                read=read,
                **settings,
            ):
                made = piece.cpu()
                progress.add(made.shape[0] * made.shape[1])
                yield number, made.unflatten(0, (len(batch), width)).numpy()


@contextlib.contextmanager
def _source_told(loaded: LoadedModel) -> Iterator[None]:
    """Adds to a NotFinite which model it is."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"The model of {loaded.source} cannot generate from this prompt. {error}") from error


def _searched(
    loaded: LoadedModel,
    batch: Sequence[Job],
    prompts: Prompts,
    condition: torch.Tensor | None,
    count: int,
    settings: dict[str, Any],
) -> np.ndarray:
    """The best that a beam search finds for each prompt, `(jobs, samples, n)` int64."""
    beams, ends, penalty = (settings[name] for name in ("beams", "stop_ids", "length_penalty"))
    with _source_told(loaded):
        found = beam_search(
            loaded.model, prompts, count, beams, condition=condition, stop_ids=ends, length_penalty=penalty
        )
    if not found.scores[:, batch[0].stop - 1].isfinite().all():
        raise ConfigError(f"There are fewer than --samples {batch[0].stop} sequences of so few tokens. Ask for fewer.")
    return found.tokens[:, batch[0].first : batch[0].stop].cpu().numpy()


def _same(batch: Sequence[Job], other: Sequence[Job]) -> bool:
    return len(batch) == len(other) == 1 and batch[0].place == other[0].place


def ended(row: np.ndarray, begin: int, stop_ids: Sequence[int]) -> np.ndarray:
    """The sequence `(length, ...)` up to its first stop from position `begin` on. What follows was generated only
    because others in the batch were longer."""
    if not stop_ids:
        return row
    stops = np.flatnonzero(np.isin(row[begin:], list(stop_ids)))
    return row[: begin + int(stops[0]) + 1] if len(stops) else row


def sequences_of(
    loaded: LoadedModel,
    jobs: list[list[Job]],
    count: int,
    place: torch.device,
    settings: dict[str, Any],
    shown: bool,
) -> list[np.ndarray]:
    """A sequence for each prompt, condition and sample: `(length,)` int64, or `(length, channels)` float32. Prompts of
    one length are read together, so nothing is padded."""
    if loaded.tokenizer is None:
        return _continued_signals(loaded, jobs, count, place, settings, shown)
    held: dict[tuple[int, int], list[np.ndarray]] = {}
    progress = Progress(count * n_sequences(jobs), None, "token", shown)
    try:
        for number, made in pieces(loaded, jobs, count, place, settings, progress):
            for job, rows in zip(jobs[number], made, strict=True):
                for sample, row in enumerate(rows, start=job.first):
                    held.setdefault((job.place, sample), []).append(row)
    finally:
        progress.close()
    found = []
    prompts = {job.place: job.prompt.values[:] for batch in jobs for job in batch}
    for key in sorted(held):
        begin = prompts[key[0]].astype(np.int64)
        row = ended(np.concatenate([begin, *held.pop(key)]), len(begin), settings.get("stop_ids", ()))
        stop: StopStrings | None = settings.get("stop")
        found.append(row if stop is None else np.concatenate([begin, stop.cut(begin, row[len(begin) :])]))
    return found


def _continued_signals(
    loaded: LoadedModel,
    jobs: list[list[Job]],
    count: int,
    place: torch.device,
    settings: dict[str, Any],
    shown: bool,
) -> list[np.ndarray]:
    found: dict[tuple[int, int], np.ndarray] = {}
    with tqdm(total=len(jobs), unit="batch", disable=not shown or len(jobs) == 1) as bar:
        for batch in jobs:
            width = batch[0].stop - batch[0].first
            with _source_told(loaded):
                made = continue_values(
                    loaded.model,
                    torch.from_numpy(np.stack([job.prompt.values[:] for job in batch])).to(place),
                    count,
                    condition=conditions_of(batch, place),
                    samples=width,
                    numbers=numbers_of(batch),
                    progress=shown and len(jobs) == 1,
                    **settings,
                ).cpu()
            for job, rows in zip(batch, made.unflatten(0, (len(batch), width)).numpy(), strict=True):
                for number, row in enumerate(rows, start=job.first):
                    found[job.place, number] = row
            bar.update()
    return [found[key] for key in sorted(found)]
