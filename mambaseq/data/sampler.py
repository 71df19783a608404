"""The order of training data as a function of seed and position, so that a run can be resumed anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class PositionedBatchSampler(Sampler[list[int]]):
    """Batches of dataset indices; which indices batch k of epoch e holds depends on (seed, e, k) alone.

    A finite dataset is permuted anew in every epoch. An endless one (`dataset.endless`, whose item i is drawn by
    a generator seeded with i) gets consecutive indices, `epoch * size + i`, so that no epoch repeats another.
    Each of `world_size` processes takes its own slice of every global batch of `batch_size * world_size` items;
    what is left over at an epoch's end is dropped, so that all processes make the same number of steps.

    `epoch` and `start_batch` are set before iteration begins; `start_batch` is where a resumed epoch goes on and
    falls back to 0 once that epoch has been handed out.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        endless: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.shuffle, self.endless = shuffle, endless
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world_size)

    def _order(self) -> np.ndarray:
        if self.endless:
            return np.arange(self.epoch * self.size, (self.epoch + 1) * self.size)
        if self.shuffle:
            return np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        return np.arange(self.size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        start, self.start_batch = self.start_batch, 0
        per_step = self.batch_size * self.world_size
        for k in range(start, len(self)):
            first = k * per_step + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()
