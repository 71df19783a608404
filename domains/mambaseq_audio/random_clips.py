"""The training set of clips: whole ones in random order, long ones cropped."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from mambaseq.batch import Batch
from mambaseq.data.windows import Interval
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.tiles import MakeItem, next_sample


class RandomClips:
    """Endless training set: item i depends only on (seed, i). Each clip comes once in `len(clips)` items, in a new
    random order each time; a clip longer than `length` is cropped at a random place."""

    endless = True

    def __init__(
        self,
        clips: Sequence[Interval],
        conditions: Sequence[int] | Sequence[tuple[int, ...]] | None,
        length: int,
        seed: int,
        step: int = 1,
        first: int = MuLaw.start_id,
        make: MakeItem | None = None,
    ) -> None:
        """length: samples of an item at most. conditions: of each clip, ids or rows (see `mambaseq.conditions`). step:
        crops begin at multiples of it. first: what precedes a clip. make: makes items of something else than samples.
        """
        self.first, self.make = first, make
        self.clips, self.conditions, self.length, self.seed, self.step = clips, conditions, length, seed, step

    def __len__(self) -> int:
        return len(self.clips)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - the set lives as long as the run
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch, 0)).permutation(len(self.clips))

    def __getitem__(self, index: int) -> Batch:
        epoch, position = divmod(index, len(self.clips))
        which = int(self._order(epoch)[position])
        clip = self.clips[which]
        length = min(self.length, len(clip))
        places = (len(clip) - length) // self.step + 1
        start = self.step * int(np.random.default_rng((self.seed, index, 1)).integers(places))
        condition = None if self.conditions is None else self.conditions[which]
        if self.make is not None:
            return self.make(clip, start, length, condition)
        previous = int(clip.read(start - 1, 1)[0]) if start else self.first
        return next_sample(previous, clip.read(start, length), condition)
