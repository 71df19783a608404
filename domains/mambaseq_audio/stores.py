"""Recordings decoded once: token stores of levels."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from mambaseq.data.cache import Unchanged, fingerprint
from mambaseq.data.refusals import list_bad, reason_at, told_together
from mambaseq.data.store import TokenStore
from mambaseq.errors import DataError, UserError
from mambaseq.limits import SAMPLES, UNPACKED_RATIO
from mambaseq.resources import cores
from mambaseq_audio.io import Channels, by_channel, signal_blocks
from mambaseq_audio.mulaw import Codec, MuLaw
from mambaseq_audio.notices import Notices
from mambaseq_audio.recordings import Recording

RESAMPLER = "soxr HQ"
"""Levels depend on this version: another one makes another store."""

_SMALL = 8 * 2**20  # bytes of a file up to which it is decoded beside others
_MANY = 500  # files from which a bar is shown
_THREADS = 8
_AHEAD = 8  # files for each thread that wait to be written

A = TypeVar("A")
B = TypeVar("B")


@dataclasses.dataclass(frozen=True)
class SoundStore:
    """Recordings and their levels.

    recordings: those that can be read. records: of each, its number in `store`, whose records are `(length,)` integers.
    """

    recordings: list[Recording]
    records: list[int]
    store: TokenStore

    def sources(self) -> dict[str, str]:
        """The sha256 of each file."""
        known = self.store.meta["sources"]
        return {str(one.path): str(known[i]["sha256"]) for one, i in zip(self.recordings, self.records, strict=True)}


def sound_store(
    label: str,
    recordings: Sequence[Recording],
    sample_rate: int,
    *,
    resample: bool,
    channels: Channels,
    skip_bad: bool = False,
    codec: Codec | None = None,
) -> SoundStore:
    """The levels of recordings, decoded at first use by several threads.

    codec: what a sample becomes; mu-law if None. skip_bad: recordings that cannot be used are left out, and listed;
        otherwise they are listed in an error.
    See `mambaseq_audio.io.signal_blocks` for the settings and errors.
    """
    if channels == "each":
        recordings = [part for parts in _side_by_side(by_channel, recordings) for part in parts]
    paths = list(dict.fromkeys(one.path for one in recordings))
    files = Unchanged(paths)
    identities = identities_of(paths)
    codec = codec or MuLaw()
    meta = {
        "codec": "mulaw" if isinstance(codec, MuLaw) else [codec.name, codec.options],
        "sample_rate": sample_rate,
        "resample": RESAMPLER if resample else False,
        "channels": channels,
        "sources": [identities[one.path] for one in recordings],
        "recordings": [[one.name, one.start, one.end, one.channel] for one in recordings],
        # what is left out depends on the limits
        "skip_bad": [SAMPLES.value, UNPACKED_RATIO.value] if skip_bad else False,
    }

    def blocks(one: Recording, notices: Notices) -> Iterator[np.ndarray]:
        told = signal_blocks(one, sample_rate, resample=resample, channels=channels, notices=notices)
        return map(codec.encode, told)

    return kept_store(label, Levels(recordings, blocks, skip_bad), codec.dtype, meta, files)


def kept_store(label: str, levels: Levels, dtype: str, meta: dict[str, Any], files: Unchanged) -> SoundStore:
    """The store of what is read, made at first use. meta: everything that it depends on, with the identities of its
    files as "sources". files: as they were before these were found."""
    recordings = levels.recordings
    store = TokenStore.cached(label, levels, dtype, meta, unchanged=files.check)
    records = [number for number, length in enumerate(store.lengths.tolist()) if length]
    if len(records) < len(recordings) and not levels.bad:  # they were listed when the store was made
        without = [one for one, length in zip(recordings, store.lengths.tolist(), strict=True) if not length]
        bad = [(str(one), "could not be used when it was first read") for one in without]
        list_bad(bad, len(recordings), "recordings")
    return SoundStore([recordings[number] for number in records], records, store)


def identities_of(paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """What a store knows a file by."""
    return dict(zip(paths, _side_by_side(_identity, paths, "checksums of sounds"), strict=True))


def _identity(path: Path) -> dict[str, Any]:
    """See `fingerprint`. A file that cannot be read is told of when it is decoded."""
    try:
        return fingerprint(path)
    except DataError:
        return {"name": path.name, "size": None, "sha256": None}


def _side_by_side(work: Callable[[A], B], items: Sequence[A], told: str = "") -> Iterator[B]:
    """What `work` makes of each item, in their order, by several threads; a few are made ahead.

    told: what is done, for the bar."""
    waiting: deque[Future[B]] = deque()
    count = max(min(cores(), _THREADS, len(items)), 1)
    bar: Iterable[A] = tqdm(items, told, unit="file", disable=None if told and len(items) >= _MANY else True)
    with ThreadPoolExecutor(count, "sounds") as threads:
        try:
            for item in bar:
                waiting.append(threads.submit(work, item))
                if len(waiting) > _AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)


class Levels:
    """Called, makes the records of a store. bad: what is wrong with recordings, by their place."""

    def __init__(
        self,
        recordings: Sequence[Recording],
        blocks: Callable[[Recording, Notices], Iterator[np.ndarray]],
        skip_bad: bool,
    ) -> None:
        """blocks: reads a recording, piece by piece."""
        self.recordings, self._blocks, self.skip_bad = recordings, blocks, skip_bad
        self.notices = Notices()
        self.bad: list[tuple[str, str]] = []

    def _small(self, one: Recording) -> list[np.ndarray] | UserError | None:
        """The levels of a small file, or its error; None for a large one, of which only a piece is in memory."""
        found, size = [], 0
        try:
            if one.path.is_file() and one.path.stat().st_size > _SMALL:
                return None
            for block in self._blocks(one, self.notices):
                found.append(block)
                size += len(block)
                if size > _SMALL:
                    return None
        except UserError as error:
            return error
        return found

    def __call__(self) -> Iterator[tuple[str, np.ndarray | Iterator[np.ndarray]]]:
        self.bad = []
        errors: list[UserError] = []
        found = _side_by_side(self._small, self.recordings, "reading sounds")
        for one, levels in zip(self.recordings, found, strict=True):
            if levels is None and (errors or self.skip_bad):  # what is wrong is known before anything is kept
                levels = self._checked(one)
            if isinstance(levels, UserError):
                errors.append(levels)
                self.bad.append((str(one), reason_at(levels, str(one), str(one.path))))
                yield one.name, np.zeros(0, dtype=np.uint8)
            elif errors and not self.skip_bad:
                continue
            elif levels is None:
                yield one.name, self._caught(one, errors)
            else:
                yield one.name, np.concatenate(levels)
        self.notices.tell()
        self.notices.tell_rates()
        if len(errors) == 1 and not self.skip_bad:
            raise errors[0]
        if errors:
            list_bad(self.bad, len(self.recordings), "recordings")
            if not self.skip_bad or len(errors) == len(self.recordings):
                remedy = "" if self.skip_bad else ", or set data.skip_bad: true to go on without them"
                raise DataError(told_together(self.bad, len(self.recordings), "recordings", remedy))

    def _caught(self, one: Recording, errors: list[UserError]) -> Iterator[np.ndarray]:
        """The levels of a large file, piece by piece. What is wrong with it goes to `errors`, and is raised with the
        others at the end."""
        try:
            yield from self._blocks(one, self.notices)
        except UserError as error:
            errors.append(error)
            self.bad.append((str(one), reason_at(error, str(one), str(one.path))))

    def _checked(self, one: Recording) -> UserError | None:
        try:
            deque(self._blocks(one, Notices()), maxlen=0)
        except UserError as error:
            return error
        return None
